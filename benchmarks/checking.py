"""What checking costs: `python -m benchmarks.checking`; `--help` lists its options.

Saves and loads of one state in one process, checked and unchecked by turns, each pair in the other
order than the one before. Unchecked, a save takes no checksum of a block, and a load reads as it
does what has none. In memory (`/dev/shm`) nothing else is slow, so the share of checking is at its
worst. Loads are from the page cache, and on a disk with the files taken out of it before, too.

Reported are the medians of the ratios of pairs, by the clock and by processor time (which others at
work on the machine disturb less), the medians of speed, and the most memory beside the state.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import holdfast
from holdfast.engine.source import Source
from holdfast.format import checksum

TENSOR_MIB = 32


def main() -> None:
    """Measure, and print a line for saving and one for loading."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.manual_seed(0)
    state = {f"w{n}": torch.randn(TENSOR_MIB << 18) for n in range(asked.mib // TENSOR_MIB)}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        path = Path(place) / "checkpoint"

        def remove() -> None:
            shutil.rmtree(path, ignore_errors=True)

        def save() -> None:
            holdfast.save(path, state)

        def load() -> None:
            holdfast.load(path, target)

        def forget() -> None:
            for file in path.iterdir():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        say(f"{asked.mib} MiB in {asked.folder}, {asked.rounds} pairs, torch {torch.__version__}")
        compare("save", save, remove, asked.mib, asked.rounds)
        compare("load from memory", load, lambda: None, asked.mib, asked.rounds)
        if not asked.folder.is_relative_to("/dev/shm"):
            compare("load from disk", load, forget, asked.mib, asked.rounds)
    assert all(torch.equal(tensor, target[name]) for name, tensor in state.items())


def compare(
    what: str, work: Callable[[], None], before: Callable[[], None], mib: int, rounds: int
) -> None:
    """Measure both by turns, after one of each that does not count; end with a checked one."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    processor_s: dict[bool, list[float]] = {True: [], False: []}
    peak_mib: dict[bool, float] = {True: 0.0, False: 0.0}
    for turn in range(rounds + 1):
        for checked in (True, False) if (rounds - turn) % 2 else (False, True):
            before()
            with contextlib.nullcontext() if checked else unchecked():
                held_mib = memory_mib("VmRSS", reset=True)
                started, processor_started = time.perf_counter(), time.process_time()
                work()
                took, processor = time.perf_counter(), time.process_time()
            if turn:
                seconds[checked].append(took - started)
                processor_s[checked].append(processor - processor_started)
                peak_mib[checked] = max(peak_mib[checked], memory_mib("VmHWM") - held_mib)
    checked_s, unchecked_s = (statistics.median(seconds[key]) for key in (True, False))
    say(
        f"{what}: checked / unchecked {ratio(seconds)} by the clock, {ratio(processor_s)} of "
        f"processor time; {mib / 1024 / checked_s:.2f} against {mib / 1024 / unchecked_s:.2f} GiB/s"
        f"; memory beside the state {peak_mib[True]:.0f} against {peak_mib[False]:.0f} MiB"
    )


def ratio(measured: dict[bool, list[float]]) -> str:
    """Median of the ratios of pairs, with their quartiles."""
    ratios = [a / b for a, b in zip(measured[True], measured[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without a checksum of any block of a tensor."""
    real = checksum.block_checksums, Source.checksums
    try:
        checksum.block_checksums = lambda data: [0] * checksum.num_blocks(len(data))
        Source.checksums = lambda *_: None  # type: ignore[method-assign]
        yield
    finally:
        checksum.block_checksums, Source.checksums = real  # type: ignore[method-assign]


def memory_mib(field: str, *, reset: bool = False) -> float:
    """Of this process, as Linux says; `reset` lets the peak start from here."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) / 1024


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
