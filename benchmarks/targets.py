"""Performance targets, and whether the measured figures meet them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Section

Sections = Mapping[str, Section]

PINNED = "holdfast, async_with_pinned_mem"
BACKGROUND_PEERS = (
    "dcp, thread",
    "dcp, thread, staged in a thread",
    "dcp, process, shared memory",
    "torch_checkpointing",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result for one target."""

    measured: str
    met: bool | None
    """Whether the target is met; None: not measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """Value that a figure must reach."""

    figure: str
    target: str
    measure: Callable[[Sections], Verdict]


def verdict(target: Target, sections: Sections) -> Verdict:
    """Compare the figures with a target; a missing section or system is reported as such."""
    try:
        return target.measure(sections)
    except KeyError as missing:
        return Verdict(f"not measured: no {missing.args[0]}", None)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def times(
    figure: str, most: str, section: str, system: str, *peers: str, column: str = "seconds"
) -> Target:
    """Target: at most `most` times the figure of a peer, or of the best of several, by round."""

    def measure(sections: Sections) -> Verdict:
        peer, note = _best(sections[section], peers, column)
        ratios = sections[section].ratios(system, peer, column)
        return Verdict(f"{_spread(ratios)} times{note}", statistics.median(ratios) <= float(most))

    return Target(figure, f"at most {most}", measure)


def faster(figure: str, least: str, section: str, system: str, peer: str) -> Target:
    """Target: at least `least` times as fast as a peer, by round."""

    def measure(sections: Sections) -> Verdict:
        ratios = sections[section].ratios(peer, system)
        return Verdict(f"{_spread(ratios)} times", statistics.median(ratios) >= float(least))

    return Target(figure, f"at least {least}", measure)


def _best(section: Section, peers: Sequence[str], column: str) -> tuple[str, str]:
    """Return the only peer, or the best of several with a note of its name."""
    if len(peers) == 1:
        return peers[0], ""
    best = section.best(peers, column)
    return best, f" ({best})"


def share_of_best(figure: str, divisor: int, column: str) -> Target:
    """Target: at most 1/`divisor` of the best background peer's median; a loss may be negative."""

    def measure(sections: Sections) -> Verdict:
        section = sections["overlap"]
        peer = section.best(BACKGROUND_PEERS, column)
        found, best = section.median(PINNED, column), section.median(peer, column)
        met = found <= max(best / divisor, 0.0)
        return Verdict(f"{found:.2f} s, the best {best:.2f} s ({peer})", met)

    return Target(figure, f"at most 1/{divisor}", measure)


def blocked(sections: Sections) -> Verdict:
    """Compare the time that `save()` blocks with 10 ms, and 1 ms more per GB."""
    section = sections["overlap"]
    most_ms = 10 + section.facts["nbytes"] / 1e9
    blocked_ms = 1000 * section.median(PINNED, "blocked_s")
    return Verdict(f"{blocked_ms:.1f} ms of {most_ms:.1f} ms", blocked_ms <= most_ms)


def slowed(sections: Sections) -> Verdict:
    """Compare how much steps are slowed with plain traffic, by round: 2 percentage points more."""
    section = sections["overlap"]
    pairs = zip(section.figures[PINNED], section.figures["plain traffic"], strict=True)
    points = [figure["slowed_pct"] - plain["slowed_pct"] for figure, plain in pairs]
    return Verdict(f"{_spread(points)} points", statistics.median(points) <= 2)


def needed(case: str) -> Target:
    """Target: read only the needed bytes, and 1 % for the indices."""

    def measure(sections: Sections) -> Verdict:
        section, system = sections["resharding"], f"holdfast, {case}"
        read, needed_mb = section.median(system, "read_mb"), section.median(system, "needed_mb")
        return Verdict(f"{read / needed_mb:.2f} times ({read:,.0f} MB)", read <= 1.01 * needed_mb)

    return Target(f"load, {case}: bytes read, against bytes needed", "1", measure)


def extra_memory(work: str, section: str) -> Target:
    """Target: at most 64 MiB of extra memory, in every round."""

    def measure(sections: Sections) -> Verdict:
        most = sections[section].most(OURS, "extra_mib")
        return Verdict(f"{most:.3g} MiB", most <= 64)

    return Target(f"{work}: extra memory of a process", "at most 64 MiB", measure)


def list_cpu(sections: Sections) -> Verdict:
    """Compare the processor time of `holdfast list`, in every round, with 150 ms."""
    most = sections["listing"].most("holdfast list", "cpu_s")
    return Verdict(f"{most:.3g} s", most <= 0.15)


FROM_MEMORY = "raw, from memory"
OURS, META, UNCHECKED = "holdfast", "torch_checkpointing", "holdfast, unchecked"
SAVE, LOAD = "save, 1 process", "load, warm, 1 process"
SMALL, MANY = "8,000 tensors of 4 KiB", "4 ranks, FSDP shards"
WHILE = "save while training"
DCP_SAVES = {"": "dcp", ", 2 threads": "dcp, 2 threads"}
CASES = {"4 to 2": "1.8", "4 to 1": "1.8", "4, rows to columns": "2.5", "an eighth": "6.0"}

TARGETS = (
    times(f"{SAVE}: against a raw write", "1.10", "saving", OURS, "raw"),
    times(f"{SAVE}: against a raw write of the state itself", "1.10", "saving", OURS, FROM_MEMORY),
    *(
        faster(f"{SAVE}: faster than `dcp.save`{threads}", "2.8", "saving", OURS, peer)
        for threads, peer in DCP_SAVES.items()
    ),
    times(f"{SAVE}: CPU against `dcp.save`", "0.25", "saving", OURS, "dcp", column="cpu_s"),
    faster(f"{SAVE}: faster than {META}", "3.5", "saving", OURS, META),
    faster(f"{SAVE}: faster than `torch.save`", "2.8", "saving", OURS, "torch"),
    faster(f"{SAVE}: faster than safetensors + fsync", "2.0", "saving", OURS, "safetensors"),
    times(
        f"{SMALL}: CPU of a first save, against `dcp.save`",
        "0.10",
        "small",
        OURS,
        "dcp",
        column="cpu_s",
    ),
    times(
        f"{SMALL}: CPU of later saves, against `dcp.save`",
        "0.10",
        "small",
        f"{OURS}, later",
        "dcp, later",
        column="cpu_s",
    ),
    *(
        faster(
            f"save, {MANY}: faster than `dcp.save`{threads}", "2.0", "sharded_saving", OURS, peer
        )
        for threads, peer in DCP_SAVES.items()
    ),
    times(f"save, {MANY}: against a raw write", "1.15", "sharded_saving", OURS, "raw"),
    share_of_best(f"{WHILE}: time lost, against the best", 5, "lost_s"),
    Target(f"{WHILE}: blocked in `save()`", "at most 10 ms + 1 ms per GB", blocked),
    share_of_best(f"{WHILE}: time until durable, against the best", 2, "durable_s"),
    Target(f"{WHILE}: steps slowed beyond plain traffic", "at most 2 points", slowed),
    times(f"{LOAD}: against a raw read", "1.2", "loading", OURS, "raw"),
    faster(f"{LOAD}: faster than `dcp.load`", "3", "loading", OURS, "dcp"),
    faster(f"{LOAD}: faster than {META}", "3", "loading", OURS, META),
    faster(f"load, warm, {MANY}: faster than `dcp.load`", "1.9", "sharded_loading", OURS, "dcp"),
    times(
        f"load, warm, {MANY}: CPU against `dcp.load`",
        "0.5",
        "sharded_loading",
        OURS,
        "dcp",
        column="cpu_s",
    ),
    *(
        target
        for who, section in (("1 process", "cold"), (MANY, "sharded_cold"))
        for target in (
            times(
                f"load, cold, {who}: against a raw read",
                "1.15",
                section,
                OURS,
                "raw",
                "raw, direct",
            ),
            faster(f"load, cold, {who}: faster than `dcp.load`", "1", section, OURS, "dcp"),
        )
    ),
    *(
        faster(
            f"load, warm, {case}: faster than `dcp.load`",
            least,
            "resharding",
            f"{OURS}, {case}",
            f"dcp, {case}",
        )
        for case, least in CASES.items()
    ),
    *map(needed, CASES),
    extra_memory(SAVE, "saving"),
    extra_memory(f"save, {MANY}", "sharded_saving"),
    extra_memory(LOAD, "loading"),
    extra_memory(f"load, {MANY}", "sharded_loading"),
    *(
        times(f"{work}: with checksums, against without", "1.10", section, OURS, UNCHECKED)
        for work, section in (
            (SAVE, "saving"),
            (LOAD, "loading"),
            ("load, cold, 1 process", "cold"),
        )
    ),
    Target("`holdfast list` on 50 checkpoints of 1 GB: CPU", "under 150 ms", list_cpu),
)
"""Targets in the order of the page."""
