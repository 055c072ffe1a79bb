"""What Holdfast is to reach, figure by figure, and whether what was measured does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.results import Section

Sections = Mapping[str, Section]

PINNED = "holdfast, async_with_pinned_mem"
BACKGROUND = (
    "dcp, thread",
    "dcp, thread, staged in a thread",
    "dcp, process, shared memory",
    "torch_checkpointing",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was measured for one figure."""

    said: str
    met: bool | None
    """None: it could not be measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    figure: str
    target: str
    measured: Callable[[Sections], Verdict]


def verdict(row: Row, sections: Sections) -> Verdict:
    """Of one figure; what was not run, or is not installed, is said so."""
    try:
        return row.measured(sections)
    except KeyError as missing:
        return Verdict(f"not measured: no {missing.args[0]}", None)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def times(
    section: str, ours: str, theirs: str | Sequence[str], most: float, column: str = "seconds"
) -> Callable[[Sections], Verdict]:
    """At most so many times theirs, or the best one's of several, round by round."""

    def measured(sections: Sections) -> Verdict:
        found, other, of = _against(sections, section, theirs, column)
        ratios = found.ratios(ours, other, column)
        return Verdict(f"{_spread(ratios)} times{of}", statistics.median(ratios) <= most)

    return measured


def faster(
    section: str, ours: str, theirs: str | Sequence[str], least: float
) -> Callable[[Sections], Verdict]:
    """At least so many times as fast as theirs, or as the fastest of several, round by round."""

    def measured(sections: Sections) -> Verdict:
        found, other, of = _against(sections, section, theirs, "seconds")
        ratios = found.ratios(other, ours)
        return Verdict(f"{_spread(ratios)} times{of}", statistics.median(ratios) >= least)

    return measured


def _against(
    sections: Sections, section: str, theirs: str | Sequence[str], column: str
) -> tuple[Section, str, str]:
    found = sections[section]
    if isinstance(theirs, str):
        return found, theirs, ""
    other = found.best(theirs, column)
    return found, other, f" ({other})"


def share(column: str, most: float) -> Callable[[Sections], Verdict]:
    """Of the best one's that saves in the background, by medians: a loss may be below zero."""

    def measured(sections: Sections) -> Verdict:
        found = sections["overlap"]
        other = found.best(BACKGROUND, column)
        ours, theirs = found.median(PINNED, column), found.median(other, column)
        return Verdict(f"{ours:.2f} s, {theirs:.2f} s ({other})", ours <= max(most * theirs, 0.0))

    return measured


def blocked(sections: Sections) -> Verdict:
    """In milliseconds, beside what the size of the state allows."""
    found = sections["overlap"]
    most = 10 + found.facts["nbytes"] / 1e9
    ours = 1000 * found.median(PINNED, "blocked_s")
    return Verdict(f"{ours:.1f} ms of {most:.1f} ms", ours <= most)


def slowed(sections: Sections) -> Verdict:
    """In points of a percentage, round by round."""
    found = sections["overlap"]
    pairs = zip(found.figures[PINNED], found.figures["plain traffic"], strict=True)
    beyond = [ours["slowed_pct"] - plain["slowed_pct"] for ours, plain in pairs]
    return Verdict(f"{_spread(beyond)} points", statistics.median(beyond) <= 2)


def cold(section: str) -> Callable[[Sections], Verdict]:
    """Against the faster way to read the bytes."""
    return times(section, "holdfast", ("raw", "raw, direct"), 1.15)


def needed(case: str) -> Callable[[Sections], Verdict]:
    """What was read of what was needed; indexes are let pass."""

    def measured(sections: Sections) -> Verdict:
        found = sections["resharding"]
        name = f"holdfast, {case}"
        read, wanted = (found.median(name, column) for column in ("read_mb", "needed_mb"))
        return Verdict(f"{read / wanted:.2f} times ({read:,.0f} MB)", read <= 1.01 * wanted)

    return measured


def at_most(
    section: str, system: str, column: str, most: float, unit: str
) -> Callable[[Sections], Verdict]:
    """Even the greatest of its figures."""

    def measured(sections: Sections) -> Verdict:
        found = sections[section].most(system, column)
        return Verdict(f"{found:.3g} {unit}", found <= most)

    return measured


OURS, META, UNCHECKED = "holdfast", "torch_checkpointing", "holdfast, unchecked"
SHARDED = "sharded_saving", "sharded_loading", "sharded_cold"
SAVE, LOAD = "save, 1 process", "load, warm, 1 process"
SMALL, MANY = "8,000 tensors of 4 KiB", "4 ranks, FSDP shards"
WHILE = "save while training"
STOCK = ("", "dcp"), (", 2 threads", "dcp, 2 threads")
CASES = {"4 to 2": 1.8, "4 to 1": 1.8, "4, rows to columns": 2.5, "an eighth": 6.0}

ROWS = (
    Row(f"{SAVE}: against a raw write", "at most 1.10", times("saving", OURS, "raw", 1.10)),
    *(
        Row(
            f"{SAVE}: faster than `dcp.save`{how}",
            "at least 2.8",
            faster("saving", OURS, name, 2.8),
        )
        for how, name in STOCK
    ),
    Row(f"{SAVE}: faster than {META}", "at least 3.5", faster("saving", OURS, META, 3.5)),
    Row(f"{SAVE}: faster than `torch.save`", "at least 2.8", faster("saving", OURS, "torch", 2.8)),
    Row(
        f"{SAVE}: faster than safetensors + fsync",
        "at least 2.0",
        faster("saving", OURS, "safetensors", 2.0),
    ),
    Row(
        f"{SMALL}: CPU of a first save, against `dcp.save`",
        "at most 0.10",
        times("small", OURS, "dcp", 0.1, "cpu_s"),
    ),
    Row(
        f"{SMALL}: CPU of later saves, against `dcp.save`",
        "at most 0.10",
        times("small", f"{OURS}, later", "dcp, later", 0.1, "cpu_s"),
    ),
    *(
        Row(
            f"save, {MANY}: faster than `dcp.save`{how}",
            "at least 2.0",
            faster(SHARDED[0], OURS, name, 2.0),
        )
        for how, name in STOCK
    ),
    Row(f"save, {MANY}: against a raw write", "at most 1.15", times(SHARDED[0], OURS, "raw", 1.15)),
    Row(f"{WHILE}: time lost, against the best", "at most 1/5", share("lost_s", 1 / 5)),
    Row(f"{WHILE}: blocked in `save()`", "at most 10 ms + 1 ms a GB", blocked),
    Row(f"{WHILE}: time until durable, against the best", "at most 1/2", share("durable_s", 1 / 2)),
    Row(f"{WHILE}: steps slowed beyond plain traffic", "at most 2 points", slowed),
    Row(f"{LOAD}: against a raw read", "at most 1.3", times("loading", OURS, "raw", 1.3)),
    Row(f"{LOAD}: faster than `dcp.load`", "at least 3", faster("loading", OURS, "dcp", 3)),
    Row(f"{LOAD}: faster than {META}", "at least 3", faster("loading", OURS, META, 3)),
    Row(
        f"load, warm, {MANY}: faster than `dcp.load`",
        "at least 1.9",
        faster(SHARDED[1], OURS, "dcp", 1.9),
    ),
    Row(
        f"load, warm, {MANY}: CPU against `dcp.load`",
        "at most 0.5",
        times(SHARDED[1], OURS, "dcp", 0.5, "cpu_s"),
    ),
    *(
        Row(f"load, cold, {who}: {against}", target, measured)
        for who, part in (("1 process", "cold"), (MANY, SHARDED[2]))
        for against, target, measured in (
            ("against a raw read", "at most 1.15", cold(part)),
            ("faster than `dcp.load`", "at least 1", faster(part, OURS, "dcp", 1)),
        )
    ),
    *(
        Row(
            f"load, warm, {case}: faster than `dcp.load`",
            f"at least {least}",
            faster("resharding", f"{OURS}, {case}", f"dcp, {case}", least),
        )
        for case, least in CASES.items()
    ),
    *(Row(f"load, {case}: bytes read, of those needed", "1", needed(case)) for case in CASES),
    *(
        Row(f"{what}: extra memory of a process", "at most 64 MiB", at_most(*where, 64, "MiB"))
        for what, where in (
            (SAVE, ("saving", OURS, "extra_mib")),
            (f"save, {MANY}", (SHARDED[0], OURS, "extra_mib")),
            (LOAD, ("loading", OURS, "extra_mib")),
            (f"load, {MANY}", (SHARDED[1], OURS, "extra_mib")),
        )
    ),
    *(
        Row(
            f"{what}: checked, against unchecked", "at most 1.10", times(part, OURS, UNCHECKED, 1.1)
        )
        for what, part in ((SAVE, "saving"), (LOAD, "loading"), ("load, cold, 1 process", "cold"))
    ),
    Row(
        "`holdfast list` on 50 steps of 1 GB: CPU",
        "under 150 ms",
        at_most("listing", "holdfast list", "cpu_s", 0.15, "s"),
    ),
)
"""All of them."""
