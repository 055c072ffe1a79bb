"""`holdfast verify`: check that checkpoints hold the bytes that were written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from holdfast.catalog.catalog import location, steps_in
from holdfast.catalog.findings import FORMATS, VerifyReport, by_cause, unreadable_among
from holdfast.catalog.listing import local_rows
from holdfast.catalog.listing import resumable as newest_resumable
from holdfast.catalog.marks import clear_damaged, damaged_steps, mark_damaged
from holdfast.catalog.open_any import check_exists, format_of, is_folder, other_checkpoints
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.pieces import note_on
from holdfast.catalog.seal import is_sealed, read_seal
from holdfast.catalog.steady import is_deleted
from holdfast.catalog.verify import VerifyTarget, failed, verify
from holdfast.cli.exports import checked_export, raise_if_wrong, say_export
from holdfast.cli.terminal import (
    POSITIONAL,
    JsonOptions,
    parsed,
    progress,
    say,
    say_error,
    say_json,
    spelled_resume,
)
from holdfast.errors import DamagedError, HoldfastError, StorageError, UsageError
from holdfast.format.names import step_of, step_of_folder
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.listed import ListedStore
from holdfast.storage.opening import store_to_save
from holdfast.storage.store import ReadStore

CAUSES_MAX = 50
"""Maximum number of causes of damage to print."""


@dataclass(frozen=True, slots=True)
class VerifyArguments(JsonOptions):
    """Check that a checkpoint holds the bytes that were written: a checkpoint of Holdfast or of
    stock torch.distributed.checkpoint, a Hugging Face folder, a .pt file; or every checkpoint in a
    folder, whatever its name. Exits with 7 where one is damaged, with 9 where a file cannot be
    read.

    Example: holdfast verify outputs/checkpoint/step-500
    """

    path: str = field(metadata=POSITIONAL)
    """Path or URL of a checkpoint, or of a folder of checkpoints."""

    quick: bool = False
    """Check indexes and file sizes only, no data."""

    as_export: bool = False
    """Also check a Hugging Face folder as the programs do that load it: configuration, index,
    headers, names, tokenizer."""

    against: str | None = None
    """With --as-export: Hugging Face folder whose logits must be the same, by transformers."""

    mark: bool = False
    """Write a mark beside each damaged checkpoint, and delete it from each undamaged one: resumes,
    retention and `holdfast list` skip marked checkpoints. Files that cannot be read change no
    mark."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast verify`: check the data, and print the findings. Return the exit status."""
    options = parsed(VerifyArguments, "verify", arguments)
    if options.mark and options.quick:
        raise UsageError("`--mark` needs all data read: no `--quick`")
    if options.against is not None and not options.as_export:
        raise UsageError("`--against` needs `--as-export`")
    store, name = open_for_reading(options.path)
    check_exists(store, name)
    holds_many = format_of(store, name) is None and is_folder(store, name)
    steps = steps_in(store, name) if holds_many else []
    others = other_checkpoints(store, name) if holds_many else []
    checkpoints = steps + [f"{name}/{other}" for other in others]
    if options.mark:
        _check_markable(location(store, name), steps if checkpoints else [name])
    if checkpoints:
        reports = [*verified(store, checkpoints, options.quick).values()]
    else:
        with progress(name, stored_bytes(store, name)) as advance:
            report = verify(VerifyTarget(store, name, options.quick, advance))
        note = note_on(store, name)
        reports = [replace(report, notes=(note, *report.notes)) if note is not None else report]
    if options.mark:
        # Only folders named `step-N` get a mark, since retention and resumes ignore all others.
        _mark([report for report in reports if _step_of(report.where) is not None])
    marked = damaged_steps(store, name) if checkpoints else {}
    resume = resumable_here(store, name, reports, marked) if checkpoints else None
    export = None
    if options.as_export and all(report.good for report in reports):
        export = checked_export(options.path, options.against)
    if options.json:
        result: dict[str, Any] = {"good": all(r.good for r in reports), "quick": options.quick}
        result |= {"resume": resume} if checkpoints else {}
        result |= {} if export is None else {"export": asdict(export)}
        say_json(result | {"checkpoints": [asdict(r) | {"good": r.good} for r in reports]})
    else:
        is_file = not checkpoints and not is_folder(store, name)
        for report in reports:
            _say(report, options.quick, is_file=is_file)
            if report.good and report.step in marked:
                say(f"  note: {marked[report.step]}; a resume skips it")
        if checkpoints:
            say(spelled_resume(resume) if steps else "none is named step-N: a resume takes none")
        if export is not None:
            say_export(export, options.path)
    _raise_if_damaged(reports, in_folder=bool(checkpoints), marks=options.mark)
    if export is not None:
        raise_if_wrong(export, options.path)
    return 0


def _raise_if_damaged(reports: Sequence[VerifyReport], *, in_folder: bool, marks: bool) -> None:
    """Raise a DamagedError if checkpoints are damaged. `marks`: whether `--mark` was given."""
    damaged = [report for report in reports if report.damaged]
    markable = [report for report in damaged if _step_of(report.where) is not None]
    hint = "with `--mark` retention and `holdfast list` skip them too" if in_folder else None
    if marks:
        # Damage that only stock torch would notice gets no mark.
        markable = [report for report in markable if not report.loads]
        folder = reports[0].where.rpartition("/")[0]
        hint = (
            f"`holdfast prune {folder} --damaged` deletes what is marked, if there is another "
            f"checkpoint to resume from; if not, `holdfast doctor {folder} --verify` says what "
            "can be saved"
        )
    if damaged and in_folder:
        raise DamagedError(
            f"{len(damaged)} of {len(reports)} checkpoints are damaged",
            hint=hint if markable else None,
        )
    if damaged:
        raise DamagedError(f"`{damaged[0].where}` is damaged", hint=hint if markable else None)
    raise_if_unreadable(reports)


def raise_if_unreadable(reports: Iterable[VerifyReport]) -> None:
    """Raise a StorageError about the first checkpoint with a file that could not be read."""
    for report in reports:
        if (finding := unreadable_among(report.findings)) is not None:
            raise StorageError(
                f"`{report.where}` may be undamaged: {finding}",
                hint=finding.hint or "make the file readable, then run this command again",
            )


def verified(store: ReadStore, names: Sequence[str], quick: bool) -> dict[str, VerifyReport]:
    """Verify the checkpoints `names`, with progress on stderr. Return name -> report.

    `quick`: check only indices and file sizes. If a checkpoint cannot be verified, the error
    becomes a finding of its report. A checkpoint that another process deletes meanwhile is left
    out, with a note on stderr.
    """
    reports = {}
    listed = ListedStore(store)
    for name in names:
        # Reading all data takes long, so a list of files from the start could be out of date.
        report = _verified(listed if quick else store, name, quick)
        if not report.good and is_deleted(store, name):
            say_error(f"note: `{report.where}` was deleted meanwhile, and is left out")
            continue
        if not report.good and quick:
            report = _verified(store, name, quick)
        reports[name] = report
    return reports


def _verified(store: ReadStore, name: str, quick: bool) -> VerifyReport:
    with progress(name, 0 if quick else stored_bytes(store, name)) as advance:
        target = VerifyTarget(store, name, quick, advance)
        try:
            return verify(target)
        except HoldfastError as error:
            return failed(target, error)


def _step_of(path: str) -> int | None:
    """Return N if the last part of a path is `step-N`, else None."""
    return step_of(path.rpartition("/")[2])


def _check_markable(where: str, checkpoints: Sequence[str]) -> None:
    if not checkpoints or any(_step_of(name) is None for name in checkpoints):
        raise UsageError(
            f"`{where}` is not a checkpoint of a run, nor a folder of them",
            hint="`--mark` needs folders named step-N; without it, `verify` reads any checkpoint",
        )


def _mark(reports: Sequence[VerifyReport]) -> None:
    """Mark as damaged each checkpoint with an entry that Holdfast cannot load, since bytes have
    changed or files are missing.

    Delete the marks of the other checkpoints, except of those with files that cannot be read.
    """
    for report in reports:
        folder, _, name = report.where.rpartition("/")
        step = step_of(name)
        assert step is not None, "checked by the caller"
        store = store_to_save(folder)
        damage = [f for f in report.findings if f.concern != "frame" and not f.unreadable]
        if report.loads:
            clear_damaged(store, step)
        elif damage and not is_deleted(store, name):
            mark_damaged(store, step, str(damage[0]))


def stored_bytes(store: ReadStore, name: str) -> int:
    """Return the size of a checkpoint in bytes. Skip files whose size cannot be read."""
    try:
        listed = read_seal(store, name).files if is_sealed(store, name) else store.list(name)
        files = [f"{name}/{file}" for file in listed if not file.endswith("/")]
    except HoldfastError:
        files = [name]
    nbytes = 0
    for file in files:
        with suppress(HoldfastError):
            nbytes += store.size(file)
    return nbytes


def resumable(reports: Sequence[VerifyReport], marked: Collection[int]) -> int | None:
    """Return the step that a resume would load; None if there is none.

    `reports`: on all checkpoints of the folder. `marked`: steps that are marked as damaged, which a
    resume skips.
    """
    steps = [
        report.step
        if report.format == "sealed"
        else step_of_folder(report.where.rpartition("/")[2])
        for report in reports
        if report.loads and report.why_not is None
    ]
    return max((step for step in steps if step is not None and step not in marked), default=None)


def resumable_here(
    store: ReadStore, name: str, reports: Sequence[VerifyReport], marked: Collection[int]
) -> int | None:
    """Return the step that a resume on this host would load: from the folder `name`, or a newer one
    from the fast tier of the run. `reports`, `marked`: see `resumable`."""
    good = {_step_of(report.where) for report in reports if report.loads} - {*marked}
    local = local_rows(store, name, besides={step for step in good if step is not None})
    steps = [resumable(reports, marked), newest_resumable(local)]
    return max((step for step in steps if step is not None), default=None)


def _say(report: VerifyReport, quick: bool, *, is_file: bool) -> None:
    # Print the format of single files only: the name of a folder mostly tells its format.
    form = f", {FORMATS[report.format]}" if is_file and report.format else ""
    if report.good:
        verdict = "its structure is good" if quick else "good"
        one, several = ("file", "files") if report.format == "sealed" else ("entry", "entries")
        entries = f"1 {one}" if report.num_entries == 1 else f"{report.num_entries:,} {several}"
        say(f"{report.where}: {verdict}{form}, {entries}, {spelled_bytes(report.nbytes)}")
    else:
        places = counted(len(report.findings), "place")
        verdict = f"damaged in {places}" if report.damaged else "cannot be read"
        say(f"{report.where}: {verdict}{form}")
    causes = by_cause(report.findings)
    for line in causes[:CAUSES_MAX]:
        say(f"  {line}")
    if len(causes) > CAUSES_MAX:
        say(f"  and {len(causes) - CAUSES_MAX} more: --json lists all")
    if not report.good:
        say(f"  usable: {report.usable}")
    for note in report.notes:
        say(f"  note: {note}")
