"""`holdfast list`: the steps in a folder, and which one a resume takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from holdfast.catalog.catalog import place
from holdfast.catalog.findings import VerifyReport, said_of
from holdfast.catalog.listing import CheckpointRow, resumable, survey
from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.cli.terminal import parsed, say, say_json, say_table
from holdfast.errors import DamagedError
from holdfast.spelling import spelled_age, spelled_bytes, spelled_layout
from holdfast.storage.store import ReadStore

if TYPE_CHECKING:
    import tyro

HEAD = ("step", "size", "age", "kind", "layout", "state", "")


@dataclass(frozen=True, slots=True)
class ListArguments:
    """The steps in a checkpoint folder: size, age, kind, the layout that wrote it, whether each is
    whole, and which one a resume takes. Looks at indexes and sizes; with --verify at every byte,
    and exits with 7 where one is damaged, as verify does.

    Example: holdfast list outputs/checkpoint
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of steps, or its URL."""

    verify: bool = False
    """Read all data, too."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Print the list; the exit status."""
    asked = parsed(ListArguments, "list", arguments)
    store, name = open_for_reading(asked.folder)
    check_folder(store, name)
    rows = survey(store, name)
    damaged = 0
    if asked.verify:
        reports = _reports(store, name, rows)
        damaged = sum(not report.good for report in reports.values())
        rows = [
            _verified(row, reports.get(row.name))
            for row in rows
            if row.state == "attempt" or row.name in reports
        ]
    resume = resumable(rows)
    if asked.json:
        said = {"folder": place(store, name), "resume": resume}
        say_json({**said, "checkpoints": [asdict(row) for row in rows]})
    else:
        say_table(HEAD, [_cells(row, resume) for row in rows])
        for row in rows:
            if row.problem:
                say(f"{row.name}: {row.problem}")
    if damaged:
        raise DamagedError(
            f"{damaged} of {len(reports)} checkpoints are damaged",
            hint=f"holdfast doctor {place(store, name)} --verify",
        )
    return 0


def _reports(
    store: ReadStore, folder: str, rows: Sequence[CheckpointRow]
) -> dict[str, VerifyReport]:
    """What reading all data of each step has shown, by its name; of those still there."""
    # Not at the top: a list that reads no data does not wait for the verifier.
    from holdfast.cli.verify import verified

    steps = [f"{folder}/{row.name}" for row in rows if row.state != "attempt"]
    found = verified(store, steps, quick=False)
    return {step.rpartition("/")[2]: report for step, report in found.items()}


def _verified(row: CheckpointRow, report: VerifyReport | None) -> CheckpointRow:
    """The row with what its report says."""
    if row.state != "good" or report is None or report.good:
        return row
    problem = said_of(report.findings)
    state: Literal["good", "damaged"] = "good" if report.loads else "damaged"
    why_not = row.why_not if report.loads else problem
    return replace(row, state=state, problem=problem, why_not=why_not)


def _cells(row: CheckpointRow, resume: int | None) -> tuple[str, ...]:
    return (
        str(row.step) if row.step is not None else row.name,
        "-" if row.nbytes is None else spelled_bytes(row.nbytes),
        _age(row.created),
        row.kind or "-",
        spelled_layout(row.layout) or "-",
        row.state,
        "resume" if row.step is not None and row.step == resume else "pinned" * row.pinned,
    )


def _age(created: str | None) -> str:
    try:
        then = datetime.fromisoformat(created or "")
    except ValueError:
        return "-"
    if then.tzinfo is None:
        return "-"
    return spelled_age((datetime.now(UTC) - then).total_seconds())
