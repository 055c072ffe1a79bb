"""`holdfast list`: the steps in a folder, and which one a resume takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from holdfast.catalog.catalog import open_manifest, place, steps_in
from holdfast.catalog.findings import Report, kind_of, said_of
from holdfast.catalog.marks import damaged_steps, pinned_steps
from holdfast.catalog.resumable import misnumbered, why_not_resumable
from holdfast.catalog.steady import read_steadily
from holdfast.cli.terminal import (
    parsed,
    say,
    say_json,
    say_table,
    spelled_age,
    spelled_bytes,
    spelled_layout,
)
from holdfast.engine.root import open_for_reading
from holdfast.errors import DamagedError, HoldfastError, NotFoundError
from holdfast.format.manifest import Manifest
from holdfast.format.names import aside_of, step_standing_in
from holdfast.format.timings import Stage
from holdfast.storage.store import ReadStore

if TYPE_CHECKING:
    import tyro

HEAD = ("step", "size", "age", "kind", "layout", "state", "")


@dataclass(frozen=True, slots=True)
class List:
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


@dataclass(frozen=True, slots=True)
class Row:
    """One step, or a save that did not come to its end."""

    name: str
    step: int | None
    state: Literal["good", "damaged", "attempt"]
    kind: Literal["full", "model", "hf"] | None = None
    """`full` can be resumed from, `model` holds the model alone, `hf` holds it as Hugging Face's
    folders do."""

    nbytes: int | None = None
    created: str | None = None
    """ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """What wrote it: `world_size` is the number of ranks."""

    pinned: bool = False
    """Whether retention never removes it."""

    problem: str | None = None
    """What is wrong, where something is."""

    why_not: str | None = None
    """Reason why no run can go on from it; None where one can."""

    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each data file: what each rank has written."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """What each stage of its save has taken, over all ranks."""


def run(arguments: Sequence[str]) -> int:
    """Print the list; the exit status."""
    asked = parsed(List, "list", arguments)
    store, name = open_for_reading(asked.folder)
    rows = survey(store, name)
    damaged = 0
    if asked.verify:
        reports = _reports(store, name, rows)
        damaged = sum(not report.good for report in reports.values())
        rows = [_verified(row, reports.get(row.name)) for row in rows]
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


LookAt = Callable[[ReadStore, str], Row]
"""`look_at(store, key)`: what is known of one step, but for its marks."""


def survey(store: ReadStore, name: str, look_at: LookAt | None = None) -> list[Row]:
    """The steps below a folder, oldest first, then what is no step yet, or no longer. `look_at`
    stands in for `row_of`, should the caller know some of them.

    Raises:
        NotFoundError: no such folder, or none with a step.
    """
    steps = steps_in(store, name)
    there = store.list(name)
    listed = {step.rpartition("/")[2] for step in steps}
    folders = [one.rstrip("/") for one in there]
    asides = [one for one in folders if aside_of(one) is not None and one not in listed]
    if not steps and not asides:
        raise NotFoundError(f"`{place(store, name)}` holds no step", hint=_hint(store, name, there))
    damaged, pinned = damaged_steps(store, name), pinned_steps(store, name)
    rows = [_marked((look_at or row_of)(store, step), damaged, pinned) for step in steps]
    return rows + [Row(one, None, "attempt") for one in asides]


def _marked(row: Row, damaged: Mapping[int, str], pinned: Collection[int]) -> Row:
    if row.state == "good" and row.step is not None and row.step in damaged:
        why = damaged[row.step]
        row = Row(row.name, row.step, "damaged", problem=why, why_not=why)
    return replace(row, pinned=row.step in pinned)


def _hint(store: ReadStore, name: str, there: Sequence[str]) -> str:
    if _is_checkpoint(store, name):
        return f"it is a checkpoint itself: holdfast verify {place(store, name)}"
    folders = [one.rstrip("/") for one in there if one.endswith("/")]
    for below in folders:
        if _holds_steps(store, f"{name}/{below}"):
            return f"there are some in {place(store, name)}/{below}"
    held = [below for below in folders if _is_checkpoint(store, f"{name}/{below}")]
    if held:
        one = f"holdfast verify {place(store, name)}/{held[-1]}"
        return f"no `step-N`, but checkpoints: {', '.join(held[:10])}; {one}"
    return f"found: {', '.join(there[:10]) or 'nothing'}"


def _is_checkpoint(store: ReadStore, name: str) -> bool:
    # Not at the top: a list that has something to say waits for no verifier.
    from holdfast.catalog.verify import format_of

    try:
        return format_of(store, name) is not None
    except HoldfastError:
        return False


def _holds_steps(store: ReadStore, name: str) -> bool:
    try:
        return bool(steps_in(store, name))
    except HoldfastError:
        return False


def row_of(store: ReadStore, key: str) -> Row:
    """What is known of one step, but for its marks."""
    name = key.rpartition("/")[2]
    step = step_standing_in(name)
    try:
        manifest, kind = read_steadily(store, key, lambda: _manifest(store, key))
    except HoldfastError as error:
        return Row(name, step, "damaged", problem=error.what, why_not=error.what)
    return Row(
        name,
        step,
        "good",
        kind,
        manifest.nbytes,
        manifest.created or None,
        manifest.layout,
        problem=None if step is None else misnumbered(step, manifest),
        files=manifest.files,
        timings=manifest.timings,
        why_not=None if step is None else why_not_resumable(step, manifest),
    )


def _manifest(store: ReadStore, key: str) -> tuple[Manifest, Literal["full", "model", "hf"]]:
    try:
        manifest = open_manifest(store, key, entries=False)
        return manifest, kind_of(manifest)
    except NotFoundError as error:
        # The last step of a run may be a folder of Hugging Face's.
        from holdfast.cli.look import look_at

        try:
            return look_at(store, key).manifest, "hf"
        except NotFoundError:
            raise error from None


def _reports(store: ReadStore, folder: str, rows: Sequence[Row]) -> dict[str, Report]:
    """What reading all data of each step has shown, by its name."""
    # Not at the top: a list that reads no data does not wait for the verifier.
    from holdfast.cli.verify import verified

    steps = [row.name for row in rows if row.state != "attempt"]
    return {name: verified(store, f"{folder}/{name}", quick=False) for name in steps}


def _verified(row: Row, report: Report | None) -> Row:
    """The row with what its report says."""
    if row.state != "good" or report is None or report.good:
        return row
    problem = said_of(report.findings)
    state: Literal["good", "damaged"] = "good" if report.loads else "damaged"
    why_not = row.why_not if report.loads else problem
    return replace(row, state=state, problem=problem, why_not=why_not)


def resumable(rows: Sequence[Row]) -> int | None:
    """The step that a resume takes, as far as can be known without reading data."""
    steps = [row.step for row in rows if row.why_not is None and row.step is not None]
    return max(steps, default=None)


def _cells(row: Row, resume: int | None) -> tuple[str, ...]:
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
