"""Measuring a piece of work: its seconds, processor time, memory, and what it read."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Figure = dict[str, float]
"""What one run took, by column; units come last: `seconds`, `cpu_s`, `extra_mib`, `read_mb`."""


def measure(work: Callable[[], object]) -> Figure:
    """Run `work` once. `extra_mib` is resident memory at the peak, beside what there was before;
    `read_mb` is what was asked of files, whether or not it came from the page cache."""
    Path("/proc/self/clear_refs").write_text("5")
    held, read = _memory_mib("VmRSS"), _read_mb()
    cpu, started = time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    extra = max(0.0, _memory_mib("VmHWM") - held)
    return {"seconds": seconds, "cpu_s": cpu, "extra_mib": extra, "read_mb": _read_mb() - read}


def measure_together(work: Callable[[], object]) -> Figure:
    """Run `work` on all ranks, until the last one is done: processor time and bytes of all of them,
    memory of the one that took the most.

    Collective: every rank calls this.
    """
    import torch.distributed as dist

    def together() -> None:
        work()
        dist.barrier()

    dist.barrier()
    figures: list[Figure] = [{}] * dist.get_world_size()
    dist.all_gather_object(figures, measure(together))
    put_together = {"seconds": max, "extra_mib": max, "cpu_s": sum, "read_mb": sum}
    return {key: how(f[key] for f in figures) for key, how in put_together.items()}  # type: ignore[operator]


def measure_command(run: Callable[[], object]) -> Figure:
    """What a process took that `run` starts and waits for, its own start included."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_s": cpu}


def in_turns(ways: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Every way once a round, each round beginning with another, every second one backwards, so
    that none always comes after the same one. A first round is not counted."""
    found: dict[str, list[Figure]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in turns(list(ways), number):
            figure = ways[name]()
            if number:
                found[name].append(figure)
    return found


def turns(names: list[str], number: int) -> list[str]:
    """The order of a round.

    >>> turns(["a", "b", "c"], 0), turns(["a", "b", "c"], 1)
    (['a', 'b', 'c'], ['a', 'c', 'b'])
    """
    start = number % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) / 1024


def _read_mb() -> float:
    return int(Path("/proc/self/io").read_text().split()[1]) / 1e6


def machine() -> str:
    """What this was measured on, in a line."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return (
        f"{os.cpu_count()} cores ({', '.join(sorted(models)) or os.uname().machine}), "
        f"{memory:.0f} GiB of memory, Linux {os.uname().release}, torch {torch.__version__}"
    )
