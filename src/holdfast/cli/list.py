"""`holdfast list`: list the checkpoints in a folder, and show which one a resume would load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from holdfast.catalog.catalog import location
from holdfast.catalog.findings import VerifyReport, named, summary_of
from holdfast.catalog.listing import CheckpointRow, CheckpointState, resumable, survey
from holdfast.catalog.open_any import check_exists, check_folder, other_checkpoints
from holdfast.catalog.paths import open_for_reading
from holdfast.cli.terminal import POSITIONAL, JsonOptions, parsed, say, say_json, say_table
from holdfast.dashboard.history import commit_time
from holdfast.errors import DamagedError
from holdfast.format.names import step_of_folder
from holdfast.spelling import spelled_age, spelled_bytes, spelled_layout

HEAD = ("step", "size", "age", "kind", "layout", "state", "")


@dataclass(frozen=True, slots=True)
class ListArguments(JsonOptions):
    """List the checkpoints in a folder: size, age, kind, the ranks that wrote each, whether it is
    complete, and which one a resume takes. Checks indexes and file sizes, so a changed byte of the
    data stays unnoticed; with --verify every byte, and exits with 7 where one is damaged, as verify
    does.

    Example: holdfast list outputs/checkpoint
    """

    folder: str = field(metadata=POSITIONAL)
    """Path or URL of a folder of checkpoints."""

    verify: bool = False
    """Also read all data."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast list`: print the list of checkpoints. Return the exit status."""
    options = parsed(ListArguments, "list", arguments)
    store, name = open_for_reading(options.folder)
    check_exists(store, name)
    check_folder(store, name)
    rows = survey(store, name)
    num_damaged = 0
    if options.verify:
        # Imported here, since this import is slow and only `--verify` needs it.
        from holdfast.cli.verify import raise_if_unreadable, verified

        unverified = ("attempt", "local")
        paths = [f"{name}/{row.name}" for row in rows if row.state not in unverified]
        reports = verified(store, paths, quick=False)
        num_damaged = sum(report.damaged for report in reports.values())
        rows = [
            _verified(row, reports.get(f"{name}/{row.name}"))
            for row in rows
            if row.state in unverified or f"{name}/{row.name}" in reports
        ]
    resume = resumable(rows)
    others = other_checkpoints(store, name)
    where = location(store, name)
    if options.json:
        found = {"folder": where, "verified": options.verify, "resume": resume, "others": others}
        say_json({**found, "checkpoints": [asdict(row) for row in rows]})
    else:
        now = datetime.now(UTC).timestamp()
        say_table(HEAD, [_cells(row, resume, now) for row in rows])
        for row in rows:
            if row.problem:
                say(f"{row.name}: {row.problem}")
        if others:
            say(f"checkpoints of other names, which no resume takes: {named(others)}")
        if not options.verify:
            say("checked indexes and file sizes, no data; `--verify` reads all data")
    if num_damaged:
        raise DamagedError(
            f"{num_damaged} of {len(reports)} checkpoints are damaged",
            hint=f"holdfast doctor {where} --verify",
        )
    if options.verify:
        raise_if_unreadable(reports.values())
    return 0


def _verified(row: CheckpointRow, report: VerifyReport | None) -> CheckpointRow:
    """Return the row of a checkpoint, updated with the report on it, if there is one."""
    if row.state != "good" or report is None or report.good:
        return row
    problem = summary_of(report.findings)
    state: CheckpointState = "damaged" if report.damaged else "unreadable"
    state = "good" if report.loads else state
    why_not = row.why_not if report.loads else problem
    return replace(row, state=state, problem=problem, why_not=why_not)


def _cells(row: CheckpointRow, resume: int | None, now: float) -> tuple[str, ...]:
    time = commit_time(row)
    return (
        row.name if step_of_folder(row.name) is None else str(row.step),
        "-" if row.nbytes is None else spelled_bytes(row.nbytes),
        "-" if time is None else spelled_age(now - time),
        row.kind or "-",
        spelled_layout(row.layout) or "-",
        row.state,
        "resume" if row.step is not None and row.step == resume else "pinned" * row.pinned,
    )
