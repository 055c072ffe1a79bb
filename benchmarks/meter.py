"""Measure time, processor time, memory and bytes read."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

Figure = dict[str, float]
"""Measurements of one run by column: `seconds`, `cpu_s`, `extra_mib`, `read_mb`."""


def measure(work: Callable[[], object]) -> Figure:
    """Run `work` once and measure it.

    `extra_mib` is the peak of resident memory less the memory before the run. `read_mb` has the
    bytes read from files, from the disk or from the page cache.
    """
    Path("/proc/self/clear_refs").write_text("5")
    memory, read = _memory_mib("VmRSS"), _read_mb()
    cpu, started = time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    extra = max(0.0, _memory_mib("VmHWM") - memory)
    return {"seconds": seconds, "cpu_s": cpu, "extra_mib": extra, "read_mb": _read_mb() - read}


def measure_ranks(work: Callable[[], object]) -> Figure:
    """Run `work` on all ranks and measure until the last rank is done. Collective.

    Processor time and bytes are summed over the ranks. Memory is the largest of any rank.
    """
    import torch.distributed as dist

    def work_then_barrier() -> None:
        work()
        dist.barrier()

    dist.barrier()
    figures: list[Figure] = [{}] * dist.get_world_size()
    dist.all_gather_object(figures, measure(work_then_barrier))
    reductions = {"seconds": max, "extra_mib": max, "cpu_s": sum, "read_mb": sum}
    return {key: reduce(f[key] for f in figures) for key, reduce in reductions.items()}  # type: ignore[operator]


def measure_command(run: Callable[[], object]) -> Figure:
    """Measure the child process that `run` starts and waits for, its start-up included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu}


def run_rounds(systems: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Run every system once a round, in changing order, after a round that is not counted."""
    figures: dict[str, list[Figure]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name in round_order(list(systems), number):
            figure = systems[name]()
            if number:
                figures[name].append(figure)
    return figures


def round_order(names: list[T], number: int) -> list[T]:
    """Return the order of round `number`, so that no name always follows the same other.

    >>> round_order(["a", "b", "c"], 0), round_order(["a", "b", "c"], 1)
    (['a', 'b', 'c'], ['a', 'c', 'b'])
    """
    start = number % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def _read_mb() -> float:
    return int(Path("/proc/self/io").read_text().split()[1]) / 1e6


def machine() -> str:
    """Describe this machine in one line."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return (
        f"{os.cpu_count()} cores ({', '.join(sorted(models)) or os.uname().machine}), "
        f"{memory:.0f} GiB of memory, Linux {os.uname().release}, torch {torch.__version__}"
    )
