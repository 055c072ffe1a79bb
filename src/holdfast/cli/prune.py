"""`holdfast prune`: let go of steps that no rule keeps, and of what killed saves left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

from holdfast.catalog.catalog import Catalog, read_manifest
from holdfast.catalog.cleanup import execute, is_at_work, plan_cleanup
from holdfast.catalog.listing import hint_without_steps
from holdfast.catalog.open_any import check_folder, format_of
from holdfast.catalog.paths import place_of
from holdfast.catalog.replaceable import why_not_removable
from holdfast.catalog.resumable import misnumbered
from holdfast.cli.terminal import parsed, say, say_json, say_table
from holdfast.errors import HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format.names import LOCK, aside_of
from holdfast.manager.policy import STEPS_MIN, Retention, reasons_to_keep
from holdfast.manager.resume import good_steps
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.opening import folder_store, is_url

if TYPE_CHECKING:
    import tyro


@dataclass(frozen=True, slots=True)
class PruneArguments:
    """Remove steps that no rule keeps, and what killed saves left. A step stays if any rule keeps
    it; without a rule every step stays. Pinned steps and the newest two to resume from always stay.
    Damaged steps neither count nor go, unless asked for. Refused while a run saves in the folder.

    Example: holdfast prune outputs/checkpoint --keep-latest-k 3 --dry-run
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of steps."""

    keep_latest_k: int | None = None
    """Keep this many of the newest good steps."""

    keep_every_n_steps: int = 0
    """Keep each step whose number this divides."""

    keep_best_k: int = 0
    """Keep this many steps with the best metric."""

    keep_best_metric: str = "loss"
    """The metric, by the name under which the run saved it."""

    keep_best_mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest is the best."""

    damaged: bool = False
    """Remove damaged steps, too, if there are good ones to resume from."""

    dry_run: bool = False
    """Say what would go."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""

    @property
    def retention(self) -> Retention | None:
        """The rules; None where there are none."""
        counts = (self.keep_latest_k or 0, self.keep_every_n_steps, self.keep_best_k)
        if min(counts) < 0 or self.keep_latest_k == 0:
            raise UsageError("a rule keeps at least one step", hint="without a rule all stay")
        if not any(counts):
            return None
        return Retention(
            # What the floor keeps anyway, where only other rules are given.
            latest_k=self.keep_latest_k or STEPS_MIN,
            every_n_steps=self.keep_every_n_steps,
            best_k=self.keep_best_k,
            best_metric=self.keep_best_metric,
            best_mode=self.keep_best_mode,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """One folder, and whether it stays."""

    name: str
    nbytes: int
    stays: bool
    why: str


def run(arguments: Sequence[str]) -> int:
    """Say what goes, and let it go; the exit status."""
    asked = parsed(PruneArguments, "prune", arguments)
    if is_url(asked.folder):
        raise UsageError(f"`{asked.folder}` is a URL: use the tool of that store")
    store, name = place_of(asked.folder)
    check_folder(store, name)
    catalog = Catalog(folder_store(asked.folder))
    names = [name.rstrip("/") for name in catalog.store.list()]
    if not catalog.folders() and not any(map(aside_of, names)):
        hint = hint_without_steps(store, name, catalog.store.list())
        raise NotFoundError(f"`{catalog.store.url}` holds no step", hint=hint)
    if asked.dry_run:
        _say(decide(catalog, asked), asked)
        return 0
    note = f"holdfast prune, pid {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    with catalog.store.lock(LOCK, note):
        decisions = decide(catalog, asked)
        _say(decisions, asked)
        _execute(catalog, decisions)
    return 0


def decide(catalog: Catalog, asked: PruneArguments) -> list[Decision]:
    """What goes and what stays: steps, oldest first, then what killed saves left.

    Raises:
        UsageError: damaged steps are to go, and there is no good one to resume from.
    """
    store, folders, retention = catalog.store, catalog.folders(), asked.retention
    good = {candidate.step: candidate for candidate in good_steps(catalog, folders)}
    reasons = {step: ["no rule given"] for step in good}
    if retention is not None:
        reasons = reasons_to_keep(good.values(), retention)
    if asked.damaged and not any(candidate.resumable for candidate in good.values()):
        raise UsageError(
            f"`{store.url}` has no good step to resume from: the damaged ones are all there is",
            hint="`holdfast verify` says what of them is usable",
        )
    decisions = []
    for step, folder in folders.items():
        stays, why = not asked.damaged, "damaged"
        if (kept := _why_kept(catalog, step, folder)) is not None:
            stays, why = True, kept
        elif _is_hf(catalog, folder):
            stays, why = True, "a Hugging Face folder"
        elif step in good:
            stays, why = bool(reasons[step]), ", ".join(reasons[step]) or "no rule keeps it"
        decisions.append(Decision(folder, _nbytes(catalog, folder), stays, why))
    for action in plan_cleanup(store.list()):
        stays, why = action.verb == "restore", action.why
        if is_at_work(store, action.folder):
            stays, why = True, "another process is at work on it"
        if action.folder not in folders.values():
            decisions.append(Decision(action.folder, _nbytes(catalog, action.folder), stays, why))
    return decisions


def _why_kept(catalog: Catalog, step: int, folder: str) -> str | None:
    """Why a folder stays whatever the rules say: more lies in it than one checkpoint, or another
    one than its name says, or it cannot be read now. None where the rules decide."""
    try:
        if why := why_not_removable(catalog.store, folder):
            return why
        manifest = read_manifest(catalog.store, folder, entries=False)
        for file in manifest.files:
            with suppress(NotFoundError):
                catalog.store.size(f"{folder}/{file}")
    except StorageError as error:
        return error.what  # A disk or a mount that is ill says nothing of the step.
    except HoldfastError:
        return None
    return misnumbered(step, manifest)


def _is_hf(catalog: Catalog, folder: str) -> bool:
    """Whether a step is what `last_save_in_hf` makes of it. No rule counts it or lets it go."""
    try:
        return format_of(catalog.store, folder) == "safetensors"
    except HoldfastError:
        return False


def _nbytes(catalog: Catalog, folder: str) -> int:
    store = catalog.store
    if f"{folder}/" not in store.list():
        return 0
    nbytes = 0
    try:
        for file in store.list(folder):
            with suppress(HoldfastError):
                nbytes += 0 if file.endswith("/") else store.size(f"{folder}/{file}")
    except HoldfastError:
        return 0
    return nbytes


def _say(decisions: Sequence[Decision], asked: PruneArguments) -> None:
    going = [decision for decision in decisions if not decision.stays]
    freed = sum(decision.nbytes for decision in going)
    if asked.json:
        listed = [asdict(decision) for decision in decisions]
        say_json({"folder": asked.folder, "done": not asked.dry_run, "decisions": listed})
        return
    rows = []
    for one in decisions:
        rows.append(
            (one.name, spelled_bytes(one.nbytes), "keep" if one.stays else "remove", one.why)
        )
    say_table(("folder", "size", "", "why"), rows)
    would = "would remove" if asked.dry_run else "removing"
    say(f"{would} {counted(len(going), 'folder')}, {spelled_bytes(freed)}")


def _execute(catalog: Catalog, decisions: Sequence[Decision]) -> None:
    """Names first, all of them; then the files."""
    steps = {*catalog.folders().values()}
    failed = []
    for decision in decisions:
        if decision.name in steps and not decision.stays:
            try:
                catalog.let_go(decision.name)
            except HoldfastError as error:
                failed.append(error.what)
    store = catalog.store
    # Also deletes what has just lost its name.
    failed += execute(store, plan_cleanup(store.list()))
    if failed:
        raise StorageError("not all could be removed:\n  " + "\n  ".join(failed))
