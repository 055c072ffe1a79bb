"""`holdfast prune`: remove checkpoints that no rule keeps, and leftovers of killed saves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from holdfast.catalog.catalog import Catalog, sealed_among
from holdfast.catalog.cleanup import execute, is_at_work, plan_cleanup
from holdfast.catalog.findings import is_unreadable, misnumbered
from holdfast.catalog.listing import hint_without_steps, shared_files
from holdfast.catalog.open_any import check_exists, check_folder, format_of
from holdfast.catalog.paths import open_parent
from holdfast.catalog.replaceable import why_not_replaceable
from holdfast.catalog.seal import is_sealed
from holdfast.cli.terminal import POSITIONAL, JsonOptions, parsed, say, say_json, say_table
from holdfast.cli.verify import stored_bytes
from holdfast.errors import HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format.names import LOCK, hidden_folder_of, number_of
from holdfast.manager.complete import CompleteCheckpoints
from holdfast.manager.policy import STEPS_MIN, Retention, reasons_to_keep
from holdfast.manager.resume import good_steps
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.listed import ListedStore
from holdfast.storage.opening import store_to_save
from holdfast.storage.store import Links, ReadStore, Store


@dataclass(frozen=True, slots=True)
class PruneArguments(JsonOptions):
    """Remove checkpoints that no rule keeps, and leftovers of killed saves. A checkpoint that any
    rule keeps stays; without a rule all stay. Pinned checkpoints and the newest two to resume from
    always stay. Damaged ones do not count for the rules, and stay unless --damaged is given.
    Refused while a run saves in the folder.

    Example: holdfast prune outputs/checkpoint --keep-latest-k 3 --dry-run
    """

    folder: str = field(metadata=POSITIONAL)
    """Folder of checkpoints."""

    keep_latest_k: int | None = None
    """Keep this many of the newest good checkpoints."""

    keep_every_n_steps: int = 0
    """Keep every checkpoint whose step is a multiple of this."""

    keep_best_k: int = 0
    """Keep this many checkpoints with the best metric."""

    keep_best_metric: str = "loss"
    """Name under which the run saved the metric."""

    keep_best_mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest metric is the best."""

    damaged: bool = False
    """Also remove damaged checkpoints, provided that a good one remains to resume from."""

    dry_run: bool = False
    """Only print the plan."""

    @property
    def retention(self) -> Retention | None:
        """Retention rules of the command line; None if there are none."""
        counts = (self.keep_latest_k or 0, self.keep_every_n_steps, self.keep_best_k)
        if min(counts) < 0 or self.keep_latest_k == 0:
            raise UsageError(
                "a rule must keep at least one checkpoint", hint="without a rule all stay"
            )
        if not any(counts):
            return None
        return Retention(
            # `Retention` needs a number. At least `STEPS_MIN` checkpoints are kept anyway.
            latest_k=self.keep_latest_k or STEPS_MIN,
            every_n_steps=self.keep_every_n_steps,
            best_k=self.keep_best_k,
            best_metric=self.keep_best_metric,
            best_mode=self.keep_best_mode,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether one folder stays, and why."""

    name: str
    nbytes: int
    stays: bool
    why: str


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast prune`: print which folders stay and, without `--dry-run`, delete the others.
    Return the exit status.
    """
    options = parsed(PruneArguments, "prune", arguments)
    store, name = open_parent(options.folder)
    check_exists(store, name)
    check_folder(store, name)
    catalog = Catalog(store_to_save(options.folder))
    listed = catalog.store.list()
    if not _folders(catalog) and not any(hidden_folder_of(entry.rstrip("/")) for entry in listed):
        raise NotFoundError(
            f"`{catalog.store.url}` holds no checkpoint of a run",
            hint=hint_without_steps(store, name, listed),
        )
    if options.dry_run:
        _say(catalog.store, decide(catalog, options), options)
        return 0
    note = f"holdfast prune, pid {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    with catalog.store.lock(LOCK, note):
        decisions = decide(catalog, options)
        _say(catalog.store, decisions, options)
        _execute(catalog, decisions)
    return 0


def _folders(catalog: Catalog) -> dict[int, str]:
    """Return step -> folder, for all checkpoints of a run.

    If there are none, return number -> folder, for all sealed folders. The number is the last one
    in the folder's name. Leave out a number that several sealed folders have.
    """
    folders = catalog.folders()
    if folders:
        return folders
    sealed = sealed_among(catalog.store, "", catalog.store.list())
    counts = Counter(map(number_of, sealed))
    return {n: name for name in sealed if (n := number_of(name)) is not None and counts[n] == 1}


def decide(catalog: Catalog, options: PruneArguments) -> list[Decision]:
    """Return for each folder whether it stays.

    Checkpoints come first, from the oldest to the newest, then leftovers of killed saves.
    """
    store, folders, retention = catalog.store, _folders(catalog), options.retention
    # List the folder once. Otherwise it would be listed again for each of thousands of checkpoints.
    listed = ListedStore(store)
    complete = CompleteCheckpoints(listed)
    good = {candidate.step: candidate for candidate in good_steps(catalog, folders, complete)}
    reasons = {step: ["no rule given"] for step in good}
    if retention is not None:
        reasons = reasons_to_keep(good.values(), retention)
    if options.damaged and not any(candidate.resumable for candidate in good.values()):
        raise UsageError(
            f"`{store.url}` has no good checkpoint to resume from: the damaged ones are all there "
            "is",
            hint="`holdfast verify` lists which of their components are usable",
        )
    decisions = []
    for step, folder in folders.items():
        stays, why = not options.damaged, "damaged"
        kept = list(reasons.get(step, ()))
        if reason := _why_not_decided_by_rules(listed, step, folder, complete):
            kept.append(reason)
        if kept:
            stays, why = True, ", ".join(kept)
        elif step in good:
            stays, why = False, "no rule keeps it"
        decisions.append(Decision(folder, stored_bytes(store, folder), stays, why))
    for action in plan_cleanup(store.list()):
        stays, why = action.verb == "restore", action.why
        if is_at_work(store, action.folder):
            stays, why = True, "another process is at work on it"
        if action.folder not in folders.values():
            nbytes = stored_bytes(store, action.folder)
            decisions.append(Decision(action.folder, nbytes, stays, why))
    return decisions


def _why_not_decided_by_rules(
    store: ReadStore, step: int, folder: str, complete: CompleteCheckpoints
) -> str | None:
    """Return the reason why a folder stays regardless of the rules; None if the rules decide.

    A folder stays if it contains another checkpoint, a run or files of the user, if its checkpoint
    has another step than the folder's name, if it holds a Hugging Face model, or if it cannot be
    read now.
    """
    try:
        if why := why_not_replaceable(store, folder):
            return why
        if folder in complete.errors:
            # Do not read it again: it may be readable by now, and would be taken for damaged.
            raise complete.errors[folder]
        manifest = complete.manifest(folder)
    except HoldfastError as error:
        # A failing disk or mount, or a newer format, does not mean that the checkpoint is damaged.
        return error.what if is_unreadable(error) else _export_in(store, folder)
    return _export_in(store, folder) or misnumbered(step, manifest)


def _export_in(store: ReadStore, folder: str) -> str | None:
    """Return text that says so if a folder holds a Hugging Face model, as a run leaves it whose
    last save is an export; else None."""
    with suppress(HoldfastError):
        if not is_sealed(store, folder) and format_of(store, folder) == "safetensors":
            return "a Hugging Face folder"
    return None


def _say(store: Store, decisions: Sequence[Decision], options: PruneArguments) -> None:
    if options.json:
        listed = [asdict(decision) for decision in decisions]
        say_json({"folder": options.folder, "done": not options.dry_run, "decisions": listed})
        return
    rows = [
        (one.name, spelled_bytes(one.nbytes), "keep" if one.stays else "remove", one.why)
        for one in decisions
    ]
    say_table(("folder", "size", "", "why"), rows)
    going = [decision for decision in decisions if not decision.stays]
    freed = sum(decision.nbytes for decision in going) - _kept_bytes(store, going)
    would = "would remove" if options.dry_run else "removing"
    say(f"{would} {counted(len(going), 'folder')}, {spelled_bytes(freed)}")


def _kept_bytes(store: Store, going: Sequence[Decision]) -> int:
    """Return how many bytes of the folders in `going` are not freed when these are deleted.

    A file that a remaining checkpoint shares is not freed. A file that several folders in `going`
    share is counted in the size of each, but freed only once.
    """
    names: Counter[Links] = Counter()
    sizes: dict[Links, int] = {}
    for decision in going:
        with suppress(HoldfastError):
            files = [file for file in store.list(decision.name) if not file.endswith("/")]
            for file, links in shared_files(store, decision.name, files).items():
                names[links] += 1
                sizes[links] = store.size(f"{decision.name}/{file}")
    return sum(
        sizes[links] * (going_names - (going_names == links.count))
        for links, going_names in names.items()
    )


def _execute(catalog: Catalog, decisions: Sequence[Decision]) -> None:
    """Carry out the decisions: first rename all checkpoints that do not stay, then delete files.

    If the process is killed in between, no checkpoint is left with only half of its files.
    """
    checkpoints = {*_folders(catalog).values()}
    failed = []
    for decision in decisions:
        if decision.name in checkpoints and not decision.stays:
            try:
                catalog.set_aside_for_deletion(decision.name)
            except HoldfastError as error:
                failed.append(error.what)
    store = catalog.store
    # The cleanup also deletes the folders that were renamed above.
    failed += execute(store, plan_cleanup(store.list()))
    if failed:
        raise StorageError("not everything could be removed:\n  " + "\n  ".join(failed))
