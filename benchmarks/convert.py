"""Conversions beside what their peers do: `python -m benchmarks.convert --where DIR`.

A model of random bfloat16 numbers with the shapes of a Llama, written once. Then each way in a
process of its own: wall time, and the most memory that was resident at once less what is after all
imports. The peers are torch's `dcp_to_torch` and, with `--titan PYTHON`, what TorchTitan's scripts
do: build the model on the CPU, and load or save it through its adapter and torch's Hugging Face
storage. `--only ours` measures Holdfast alone, as for a model that does not fit into memory.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of
from holdfast.hf.flavors import LLAMA3, config_of
from holdfast.hf.shards import shard

BLOCK_ELEMENTS = 8 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """What one way of converting took."""

    name: str
    seconds: float
    extra_bytes: int
    """Resident at the peak, beside what imports take."""


def make_folder(folder: Path, flavor: str) -> None:
    """Random numbers below 2 under the hub's names."""
    size = LLAMA3[flavor]
    config = config_of("llama3", size, size.vocab_size or 128256)
    mapping = mapping_of(family_of(config, where=flavor), config)
    infos = {n: ("bfloat16", mapping.shape("hf", n)) for n in mapping.names("hf")}
    export = shard(infos)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for file, image in export.files.items():
        with (folder / file).open("wb") as out:
            out.write(image.header)
            left = image.nbytes - len(image.header)
            while left:
                bits = random.integers(0, 1 << 16, min(BLOCK_ELEMENTS, left // 2), np.uint16)
                out.write((bits & 0xBFFF).tobytes())
                left -= bits.nbytes
            os.fsync(out.fileno())
    if export.index is not None:
        (folder / "model.safetensors.index.json").write_bytes(export.index)


def measure(name: str, command: Sequence[str], target: Path) -> Measured:
    """Run a conversion to its end, the page cache warm and what was written on disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    baseline = target.with_name("baseline")
    environment = {**os.environ, "BENCHMARK_BASELINE": str(baseline)}
    os.sync()
    started = time.perf_counter()
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(run.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{name} failed: {' '.join(command)}")
    imported = int(baseline.read_text())
    baseline.unlink()
    return Measured(name, seconds, used.ru_maxrss * 1024 - imported)


def scripted(python: str, body: str) -> list[str]:
    """A command that notes what its imports take before it works."""
    note = (
        "import os, resource; from pathlib import Path; "
        "Path(os.environ['BENCHMARK_BASELINE']).write_text("
        "str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))"
    )
    return [python, "-c", re.sub(r"^#note$", note, body, flags=re.M)]


def ours(*arguments: str) -> list[str]:
    """`holdfast convert`."""
    body = (
        "from holdfast.cli import convert\nimport holdfast.convert.convert\n#note\n"
        f"convert.run({list(arguments)!r})"
    )
    return scripted(sys.executable, body)


DCP_TO_TORCH = """
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
#note
dcp_to_torch_save({step!r}, {target!r})
"""

TITAN = """
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torchtitan.models.llama3 import model_registry
#note
spec = model_registry({flavor!r}, attn_backend="flex")
with torch.device("cpu"):
    model = spec.model.build()
adapter = spec.state_dict_adapter(spec.model, None)
state = model.state_dict()
"""

TITAN_FROM_HF = (
    TITAN
    + """
held = adapter.to_hf(state)
dcp.load(held, storage_reader=HuggingFaceStorageReader(path={source!r}))
dcp.save(adapter.from_hf(held), checkpoint_id={target!r})
"""
)

TITAN_TO_HF = (
    TITAN
    + """
dcp.load(state, checkpoint_id={source!r})
held = {{name: tensor.to(torch.bfloat16) for name, tensor in adapter.to_hf(state).items()}}
writer = HuggingFaceStorageWriter(
    path={target!r}, save_distributed=True, enable_consolidation=True, thread_count_consolidation=2,
    fqn_to_index_mapping={{name: 1 for name in held}},
)
dcp.save(held, storage_writer=writer)
"""
)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", type=Path, required=True, help="a folder with room for 5 models")
    parser.add_argument("--flavor", default="1B", choices=list(LLAMA3))
    parser.add_argument("--titan", help="Python of an environment with torchtitan 0.3")
    parser.add_argument("--only", choices=("ours",))
    given = parser.parse_args()
    where, flavor = given.where, given.flavor
    hub, step, target = where / f"hub-{flavor}", where / f"step-{flavor}", where / "target"
    if not hub.exists():
        make_folder(hub, flavor)
    rows = [measure("hub to dcp", ours(str(hub), str(step)), step)]
    print_row(rows[-1])
    for name, more in (
        ("dcp to hub", ["--to", "hf", "--hf-assets", str(hub)]),
        ("dcp to torch", ["--to", "torch"]),
    ):
        rows.append(measure(name, ours(str(step), str(target), *more), target))
        print_row(rows[-1])
    if given.only:
        return
    stock = DCP_TO_TORCH.format(step=str(step), target=str(target))
    print_row(measure("dcp to torch, stock", scripted(sys.executable, stock), target))
    if given.titan:
        paths = {"flavor": flavor, "source": str(hub), "target": str(target)}
        body = TITAN_FROM_HF.format(**paths)
        print_row(measure("hub to dcp, TorchTitan", scripted(given.titan, body), target))
        titan = where / "titan"
        shutil.rmtree(titan, ignore_errors=True)
        target.rename(titan)
        body = TITAN_TO_HF.format(**{**paths, "source": str(titan)})
        print_row(measure("dcp to hub, TorchTitan", scripted(given.titan, body), target))


def print_row(row: Measured) -> None:
    """A line of the table."""
    sys.stdout.write(f"| {row.name} | {row.seconds:.1f} s | {row.extra_bytes / 1e6:,.0f} MB |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
