"""`holdfast verify`: is a checkpoint as it was written?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from holdfast.catalog.catalog import steps_in
from holdfast.catalog.findings import FORMATS, VerifyReport, by_cause
from holdfast.catalog.marks import clear_damaged, damaged_steps, mark_damaged
from holdfast.catalog.open_any import format_of, is_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.pieces import note_on
from holdfast.catalog.steady import is_deleted
from holdfast.catalog.verify import VerifyTarget, failed, verify
from holdfast.cli.terminal import parsed, progress, say, say_error, say_json
from holdfast.errors import DamagedError, HoldfastError, UsageError
from holdfast.format.names import step_of, step_standing_in
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.opening import folder_store, is_url
from holdfast.storage.store import ReadStore

if TYPE_CHECKING:
    import tyro

LISTED_MAX = 50


@dataclass(frozen=True, slots=True)
class VerifyArguments:
    """Check a checkpoint: a step of Holdfast, a folder of stock torch.distributed.checkpoint or of
    Hugging Face safetensors, a .pt file; or every step in a folder. Exits with 7 where one is
    damaged.

    Example: holdfast verify outputs/checkpoint/step-500
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Checkpoint, or folder of steps, or its URL."""

    quick: bool = False
    """Check structure alone: indexes and sizes, no data."""

    mark: bool = False
    """Leave a mark beside each damaged step, and take it from each that is whole: resumes,
    retention and `holdfast list` pass over what is marked."""

    json: bool = False
    """Print JSON, with every finding."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Verify, print what was found; the exit status."""
    asked = parsed(VerifyArguments, "verify", arguments)
    if asked.mark and (asked.quick or is_url(asked.path)):
        raise UsageError("`--mark` is for folders of this machine, with all data read")
    store, name = open_for_reading(asked.path)
    steps = (
        steps_in(store, name) if format_of(store, name) is None and is_folder(store, name) else []
    )
    if steps:
        reports = [*verified(store, steps, asked.quick).values()]
    else:
        with progress(name, _nbytes(store, name)) as advance:
            reports = [verify(VerifyTarget(store, name, asked.quick, advance))]
        note = note_on(store, name)
        if note is not None:
            reports = [replace(reports[0], notes=(note, *reports[0].notes))]
    if asked.mark:
        _mark(reports)
    marked = damaged_steps(store, name) if steps else {}
    resume = resumable(reports, marked) if steps else None
    if asked.json:
        said: dict[str, Any] = {"good": all(r.good for r in reports), "quick": asked.quick}
        said |= {"resume": resume} if steps else {}
        say_json(said | {"checkpoints": [asdict(r) | {"good": r.good} for r in reports]})
    else:
        is_file = not steps and not is_folder(store, name)
        for report in reports:
            _say(report, asked.quick, is_file=is_file)
            if report.good and report.step in marked:
                say(f"  note: {marked[report.step]}; a resume passes it over")
        if steps:
            say(_resumes(resume))
    damaged = [report for report in reports if not report.good]
    if damaged:
        raise DamagedError(
            f"{len(damaged)} of {len(reports)} checkpoints are damaged"
            if steps
            else f"`{damaged[0].where}` is damaged",
            hint=None
            if asked.mark or not steps
            else "with `--mark` retention and `list` know it too",
        )
    return 0


def verified(store: ReadStore, names: Sequence[str], quick: bool) -> dict[str, VerifyReport]:
    """What is wrong with each checkpoint, with a bar on a terminal; never raises on what it is.
    Leaves out those that another process has deleted meanwhile, and says so."""
    reports = {}
    for name in names:
        with progress(name, _nbytes(store, name)) as advance:
            target = VerifyTarget(store, name, quick, advance)
            try:
                report = verify(target)
            except HoldfastError as error:
                report = failed(target, error)
        if not report.good and is_deleted(store, name):
            say_error(f"note: `{target.where}` was deleted meanwhile, and is left out")
        else:
            reports[name] = report
    return reports


def _mark(reports: Sequence[VerifyReport]) -> None:
    """Let what was found be known beside the steps."""
    for report in reports:
        folder, _, name = report.where.rpartition("/")
        step = step_of(name)
        if step is None:
            raise UsageError(
                f"`{report.where}` is no step of a run", hint="`--mark` is for folders named step-N"
            )
        if report.loads:
            clear_damaged(folder_store(folder), step)
        elif not is_deleted(folder_store(folder), name):
            mark_damaged(folder_store(folder), step, str(report.findings[0]))


def _resumes(resume: int | None) -> str:
    return f"a resume takes step {resume}" if resume is not None else "no step to resume from"


def _nbytes(store: ReadStore, name: str) -> int:
    """Of all that is there, for a progress bar."""
    try:
        files = [f"{name}/{file}" for file in store.list(name) if not file.endswith("/")]
    except HoldfastError:
        files = [name]
    nbytes = 0
    for file in files:
        # What cannot be looked at is a finding later on.
        with suppress(HoldfastError):
            nbytes += store.size(file)
    return nbytes


def resumable(reports: Sequence[VerifyReport], marked: Collection[int]) -> int | None:
    """The newest step that loads whole, can be resumed from, and is not marked as damaged."""
    steps = [step_standing_in(r.where.rpartition("/")[2]) for r in reports if _resumes_from(r)]
    return max((step for step in steps if step is not None and step not in marked), default=None)


def _resumes_from(report: VerifyReport) -> bool:
    return report.loads and report.why_not is None


def _say(report: VerifyReport, quick: bool, *, is_file: bool) -> None:
    # A folder says by its name what it is, mostly; a file could be anything.
    what = f", {FORMATS[report.format]}" if is_file and report.format else ""
    if report.good:
        how = "its structure is whole" if quick else "good"
        entries = "1 entry" if report.num_entries == 1 else f"{report.num_entries:,} entries"
        say(f"{report.where}: {how}{what}, {entries}, {spelled_bytes(report.nbytes)}")
    else:
        places = counted(len(report.findings), "place")
        say(f"{report.where}: damaged in {places}{what}")
    causes = by_cause(report.findings)
    for line in causes[:LISTED_MAX]:
        say(f"  {line}")
    if len(causes) > LISTED_MAX:
        say(f"  and {len(causes) - LISTED_MAX} more: --json lists all")
    if not report.good:
        say(f"  usable: {report.usable}")
    for note in report.notes:
        say(f"  note: {note}")
