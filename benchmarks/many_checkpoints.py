"""Costs in a folder of thousands of checkpoints: `python -m benchmarks.many_checkpoints`.

One checkpoint of a small model and its optimizer is saved. The others have hard links to its data,
and an index of their own. Commands are whole processes, the start of Python included, in their
second run, and resuming is one call. Then a run saves into folders of several sizes, with data
files of several numbers of ranks: what retention does after the save is counted. Times are CPU
seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import holdfast
from benchmarks.meter import machine, measure_command
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.format import checksum
from holdfast.format.names import MANIFEST, data_file, step_name
from holdfast.manager.policy import Retention
from holdfast.manager.resume import newest_resumable
from holdfast.manager.retention import Retainer
from holdfast.storage.local import LocalStore

SCRIPT = "import sys; from holdfast.cli.main import main; sys.exit(main())"
COMMANDS = ("list", "doctor", "verify --quick", "prune --dry-run --keep-latest-k 2")
RETAINED = ((4, 2), (4, 512), (100, 2), (100, 512), (5000, 2))
"""Numbers of checkpoints that are kept, and of data files of each."""


class CountingStore(LocalStore):
    """A folder that counts how often files are looked at, read and listed."""

    num_calls = 0

    def list(self, folder: str = "") -> list[str]:
        self.num_calls += 1
        return [*super().list(folder)]

    def size(self, key: str) -> int:
        self.num_calls += 1
        return super().size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        self.num_calls += 1
        return super().read(key, start, stop)


def save_first(folder: Path) -> Path:
    """Save step 1 of a small training run. Returns the folder of the checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    with CheckpointManager(folder, model=model, optimizers=[optimizer], config=config) as manager:
        manager.save(1)
    return folder / step_name(1)


def clone(source: Path, folder: Path, step: int, *, num_files: int = 1) -> None:
    """Make the checkpoint of a step in `folder`, with links to the data. Files of further ranks are
    empty."""
    target = folder / step_name(step)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != MANIFEST:
            os.link(file, target / file.name)
    data = (source / MANIFEST).read_bytes()
    body = data[: -len(b',"checksum":""}') - checksum.DIGITS] + b"}"
    body = body.replace(b'"step":1,', b'"step":%d,' % step, 1)
    hexed = checksum.to_hex([checksum.checksum(b"")])
    others = [data_file(rank) for rank in range(1, num_files)]
    for name in others:
        (target / name).touch()
    listed = "".join(f',["{name}",0,0,"{hexed}"]' for name in others)
    body = body.replace(b'],"values":', listed.encode() + b'],"values":', 1)
    seal = checksum.to_hex([checksum.checksum(body)])
    (target / MANIFEST).write_bytes(body[:-1] + f',"checksum":"{seal}"}}'.encode())


def cpu_seconds(command: str, folder: Path) -> float:
    """CPU seconds of a command, which must succeed."""
    verb, *options = command.split()
    arguments = [sys.executable, "-c", SCRIPT, verb, str(folder), *options]
    # Bytecode is cached by the first run, as for an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run() -> None:
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env=environment)

    run()
    return measure_command(run)["cpu_s"]


def measure_tools(count: int, folder: Path) -> list[str]:
    """Rows of the table of commands."""
    first = save_first(folder)
    for step in range(2, count + 1):
        clone(first, folder, step)
    rows = [f"| `holdfast {c}` | {cpu_seconds(c, folder):.2f} |" for c in COMMANDS]
    started = time.process_time()
    opened, _ = newest_resumable(Catalog(LocalStore(folder)), None)
    seconds = time.process_time() - started
    assert opened is not None
    assert opened.step == count
    return [*rows, f"| find the checkpoint to resume from | {seconds:.3f} |"]


def measure_retention(count: int, num_files: int, folder: Path) -> str:
    """A row of the table of retention: a save into a folder of `count` checkpoints."""
    first = save_first(folder / "source")
    for step in range(1, count + 1):
        clone(first, folder / "run", step, num_files=num_files)
    store = CountingStore(folder / "run")
    retainer = Retainer(Catalog(store), Retention(latest_k=count))
    for step in range(count + 1, count + 4):
        clone(first, folder / "run", step, num_files=num_files)
        store.num_calls = 0
        started = time.process_time()
        retainer.saved(step)
        seconds = time.process_time() - started
        retainer.wait()
    assert len(Catalog(store).steps()) == count
    return f"| {count:,} | {num_files:,} | {store.num_calls} | {seconds:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="number of checkpoints")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        lines = ["| command | CPU s |", "|---|---|", *measure_tools(options.count, Path(folder))]
    sys.stderr.write("\n".join(lines) + "\n")
    lines += ["", "| checkpoints kept | files of each | calls of the store | CPU s |"]
    lines.append("|---|---|---|---|")
    for count, num_files in RETAINED:
        with TemporaryDirectory() as folder:
            lines.append(measure_retention(count, num_files, Path(folder)))
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.out:
        head = (
            f"`python -m benchmarks.many_checkpoints`: {options.count:,} checkpoints in one "
            f"folder, holdfast {holdfast.__version__}. Machine: {machine()}.\n\n"
        )
        options.out.write_text(head + text)


if __name__ == "__main__":
    main()
