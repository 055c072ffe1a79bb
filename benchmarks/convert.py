"""Conversions by Holdfast and other libraries: `python -m benchmarks.convert --where DIR`.

The source is a Hugging Face folder of random bfloat16 numbers in the shapes of a Llama, written
once. Each conversion runs in its own process. Figures: wall time, and the peak of resident memory
less the memory after all imports.

The others are torch's `dcp_to_torch` and, with `--titan PYTHON`, the method of TorchTitan's
scripts: build the model on the CPU, and load or save it through its adapter and torch's Hugging
Face storage. With `--only ours`, only Holdfast is measured, for example with a model that is larger
than memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of
from holdfast.hf.flavors import LLAMA3, config_of
from holdfast.hf.shards import shard

CHUNK_ELEMENTS = 8 << 20


def make_folder(folder: Path, flavor: str) -> None:
    """Write a Hugging Face folder of random numbers with magnitudes below 2."""
    size = LLAMA3[flavor]
    config = config_of("llama3", size, size.vocab_size or 128256)
    mapping = mapping_of(family_of(config, where=flavor), config)
    infos = {n: ("bfloat16", mapping.shape("hf", n)) for n in mapping.names("hf")}
    export = shard(infos)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for file, layout in export.files.items():
        with (folder / file).open("wb") as out:
            out.write(layout.header)
            remaining = layout.nbytes - len(layout.header)
            while remaining:
                count = min(CHUNK_ELEMENTS, remaining // 2)
                bits = random.integers(0, 1 << 16, count, np.uint16)
                out.write((bits & 0xBFFF).tobytes())
                remaining -= bits.nbytes
            os.fsync(out.fileno())
    if export.index is not None:
        (folder / "model.safetensors.index.json").write_bytes(export.index)


def measure(name: str, command: Sequence[str], target: Path) -> None:
    """Run a conversion, sync its output, and print its table row; the page cache is warm."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    baseline = target.with_name("baseline")
    environment = {**os.environ, "BENCHMARK_BASELINE": str(baseline)}
    os.sync()
    started = time.perf_counter()
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(run.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{name} failed: {' '.join(command)}")
    extra_bytes = usage.ru_maxrss * 1024 - int(baseline.read_text())
    baseline.unlink()
    sys.stdout.write(f"| {name} | {seconds:.1f} s | {extra_bytes / 1e6:,.0f} MB |\n")
    sys.stdout.flush()


def scripted(python: str, body: str) -> list[str]:
    """Return a command that runs `body`, with its memory recorded at the line `#baseline`."""
    record = (
        "import os, resource; from pathlib import Path; "
        "Path(os.environ['BENCHMARK_BASELINE']).write_text("
        "str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))"
    )
    return [python, "-c", re.sub(r"^#baseline$", record, body, flags=re.M)]


def holdfast_convert(*arguments: str) -> list[str]:
    """Return the command `holdfast convert` with these arguments."""
    body = (
        "from holdfast.cli import convert\nimport holdfast.convert.convert\n#baseline\n"
        f"convert.run({list(arguments)!r})"
    )
    return scripted(sys.executable, body)


DCP_TO_TORCH = """
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
#baseline
dcp_to_torch_save({step!r}, {target!r})
"""

TITAN = """
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torchtitan.models.llama3 import model_registry
#baseline
spec = model_registry({flavor!r}, attn_backend="flex")
with torch.device("cpu"):
    model = spec.model.build()
adapter = spec.state_dict_adapter(spec.model, None)
state = model.state_dict()
"""

TITAN_FROM_HF = (
    TITAN
    + """
hf_state = adapter.to_hf(state)
dcp.load(hf_state, storage_reader=HuggingFaceStorageReader(path={source!r}))
dcp.save(adapter.from_hf(hf_state), checkpoint_id={target!r})
"""
)

TITAN_TO_HF = (
    TITAN
    + """
dcp.load(state, checkpoint_id={source!r})
hf_state = {{name: tensor.to(torch.bfloat16) for name, tensor in adapter.to_hf(state).items()}}
writer = HuggingFaceStorageWriter(
    path={target!r}, save_distributed=True, enable_consolidation=True, thread_count_consolidation=2,
    fqn_to_index_mapping={{name: 1 for name in hf_state}},
)
dcp.save(hf_state, storage_writer=writer)
"""
)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", type=Path, required=True, help="a folder with room for 5 models")
    parser.add_argument("--flavor", default="1B", choices=list(LLAMA3))
    parser.add_argument("--titan", help="Python of an environment with torchtitan 0.3")
    parser.add_argument("--only", choices=("ours",))
    options = parser.parse_args()
    where, flavor = options.where, options.flavor
    hf, step, target = where / f"hub-{flavor}", where / f"step-{flavor}", where / "target"
    if not hf.exists():
        make_folder(hf, flavor)
    measure("HF to DCP", holdfast_convert(str(hf), str(step)), step)
    to_hf = holdfast_convert(str(step), str(target), "--to", "hf", "--hf-assets", str(hf))
    measure("DCP to HF", to_hf, target)
    measure("DCP to torch", holdfast_convert(str(step), str(target), "--to", "torch"), target)
    if options.only:
        return
    script = DCP_TO_TORCH.format(step=str(step), target=str(target))
    measure("DCP to torch, torch's", scripted(sys.executable, script), target)
    if options.titan:
        script = TITAN_FROM_HF.format(flavor=flavor, source=str(hf), target=str(target))
        measure("HF to DCP, TorchTitan", scripted(options.titan, script), target)
        titan = where / "titan"
        shutil.rmtree(titan, ignore_errors=True)
        target.rename(titan)
        script = TITAN_TO_HF.format(flavor=flavor, source=str(titan), target=str(target))
        measure("DCP to HF, TorchTitan", scripted(options.titan, script), target)


if __name__ == "__main__":
    main()
