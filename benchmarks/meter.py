"""Measuring one piece of work: seconds, processor seconds, and the most memory that it took."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """What one run of a piece of work took."""

    seconds: float
    cpu_s: float
    extra_bytes: int
    """Of resident memory, at most, beside what there was before."""


def measure(work: Callable[[], object]) -> Figure:
    """Run `work` once."""
    before, most, over = _resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, started = time.process_time(), time.perf_counter()
    try:
        work()
    finally:
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        over.set()
        watcher.join()
    return Figure(seconds, cpu, max(0, most - before))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_turns(systems: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Every system once a round, in another order each time. A first round is not counted."""
    found: dict[str, list[Figure]] = {name: [] for name in systems}
    names = list(systems)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            figure = systems[name]()
            if number:
                found[name].append(figure)
    return found


def table(found: Mapping[str, Sequence[Figure]], nbytes: int, first: str, ours: str) -> list[str]:
    """A row a system: medians, and the medians of its ratios to two of them, round by round."""
    rows = [
        f"| system | seconds | GB/s | CPU s | extra memory | x {first} | x {ours} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        seconds = statistics.median(f.seconds for f in figures)
        cells = [
            *(name, f"{seconds:.2f}", f"{nbytes / seconds / 1e9:.2f}"),
            f"{statistics.median(f.cpu_s for f in figures):.2f}",
            f"{max(f.extra_bytes for f in figures) / 2**20:.0f} MiB",
            *(f"{_ratio(figures, found[other]):.2f}" for other in (first, ours)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _ratio(figures: Sequence[Figure], others: Sequence[Figure]) -> float:
    return statistics.median(a.seconds / b.seconds for a, b in zip(figures, others, strict=True))


def machine() -> str:
    """What this was measured on, in a line."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, torch {torch.__version__}"
