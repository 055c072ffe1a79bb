"""`holdfast doctor`: what is wrong with a folder of steps, and the command that mends it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from holdfast.catalog.catalog import place, read_manifest, steps_in
from holdfast.catalog.cleanup import is_at_work, plan_cleanup
from holdfast.catalog.findings import MODEL_IS_WHOLE, VerifyReport, said_of
from holdfast.catalog.listing import hint_without_steps
from holdfast.catalog.marks import damaged_steps
from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.cli.terminal import parsed, say, say_json
from holdfast.cli.verify import resumable, verified
from holdfast.errors import DamagedError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import LOCK, MANIFEST, METADATA, aside_of, step_name, step_of
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.local import LocalStore
from holdfast.storage.store import ReadStore

if TYPE_CHECKING:
    import tyro

Concern = Literal["damaged", "marked", "space", "rights", "left over", "in use", "unknown"]


@dataclass(frozen=True, slots=True)
class DoctorArguments:
    """What is wrong with a run's checkpoint folder, and the command that mends each: damaged steps,
    what killed saves left, locks, space, rights, checkpoints under names that no resume finds.
    Exits with 7 where a step is damaged, with 9 where a save would fail.

    Example: holdfast doctor outputs/checkpoint
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of steps, or its URL."""

    verify: bool = False
    """Read all data. Otherwise indexes and sizes alone are looked at, and damaged data is not
    seen."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong, or that a person should know."""

    concern: Concern
    where: str
    what: str
    mend: str | None = None
    """A command; None where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of steps that is looked at."""

    store: ReadStore
    name: str
    names: Sequence[str]
    """What lies in it; names of folders end in `/`."""

    reports: Sequence[VerifyReport]
    """On each step."""

    marked: Mapping[int, str]
    """Steps that a run has found damaged, with what it found."""

    read: bool = False
    """Whether all data was read."""

    @property
    def resume(self) -> int | None:
        """The step that a resume takes."""
        return resumable(self.reports, self.marked)

    @property
    def where(self) -> str:
        return place(self.store, self.name)

    def command(self, verb: str, below: str = "") -> str:
        """A command about this folder, or what is in it."""
        return f"holdfast {verb} {shlex.quote(self.where + below)}"


def run(arguments: Sequence[str]) -> int:
    """Look, say what is wrong; the exit status."""
    asked = parsed(DoctorArguments, "doctor", arguments)
    folder = _looked_at(asked.folder, quick=not asked.verify)
    troubles = [*examine(folder)]
    resume = folder.resume
    if asked.json:
        listed = [asdict(trouble) for trouble in troubles]
        said = {"folder": folder.where, "resume": resume, "read": folder.read}
        say_json({**said, "troubles": listed})
    else:
        taken = f"a resume takes step {resume}" if resume is not None else "no step to resume from"
        say(f"{folder.where}: {counted(len(folder.reports), 'step')}, {taken}")
        for trouble in troubles:
            say(f"  {trouble.concern}: {trouble.where}: {trouble.what}")
            say(f"    {trouble.mend or _without_command(trouble)}")
        if not troubles:
            say("  nothing is wrong" + ("" if folder.read else " with indexes and sizes"))
        if not folder.read:
            say(f"  no data was read: {folder.command('doctor')} --verify reads all of it")
    concerns = {trouble.concern for trouble in troubles}
    if "damaged" in concerns:
        raise DamagedError(f"`{folder.where}` holds damaged steps")
    if concerns & {"space", "rights"}:
        raise StorageError(f"a save into `{folder.where}` would fail")
    return 0


def _without_command(trouble: Trouble) -> str:
    if trouble.concern == "damaged":
        return "no command mends it: put a copy in its place, or start from other weights"
    return "nothing to do"


def _looked_at(path: str, *, quick: bool) -> Folder:
    store, name = open_for_reading(path)
    check_folder(store, name)
    names, steps = store.list(name), steps_in(store, name)
    asides = [one for one in names if aside_of(one.rstrip("/")) is not None]
    if not steps and not asides and LOCK not in names:
        raise NotFoundError(
            f"`{place(store, name)}` is no folder of steps",
            hint=hint_without_steps(store, name, names),
        )
    reports = [*verified(store, steps, quick).values()]
    return Folder(store, name, names, reports, damaged_steps(store, name), not quick)


def examine(folder: Folder) -> Iterator[Trouble]:
    """Everything that is wrong with a folder, what matters most first."""
    yield from _damaged(folder)
    if isinstance(folder.store, LocalStore):
        yield from _space(folder, folder.store)
        yield from _rights(folder)
        yield from _left_over(folder, folder.store)
    yield from _unknown(folder)


def _damaged(folder: Folder) -> Iterator[Trouble]:
    resume = folder.resume
    for report in folder.reports:
        name = report.where.rpartition("/")[2]
        if not report.findings:
            if report.step is not None and report.step in folder.marked:
                yield _marked(folder, name, report.step)
            continue
        what = said_of(report.findings)
        if report.usable not in ("nothing", "everything"):
            what += f"; usable: {report.usable}"
        if resume is not None:
            what += f"; a resume passes it over, and takes step {resume}"
        yield Trouble("damaged", name, what, _mend(folder, report, name))


def _mend(folder: Folder, report: VerifyReport, name: str) -> str | None:
    """What takes a damaged step away where there is one to resume from, or gets out of it what is
    whole; None where nothing is."""
    if report.loads:
        # The bytes around its data are not right, which only stock torch needs: a copy has them.
        copy = shlex.quote(f"{folder.where}-rescued/{name}")
        return f"{folder.command('convert', f'/{name}')} {copy}"
    refused = any(finding.concern in ("index", "file") for finding in report.findings)
    if folder.resume is None:
        if refused or not report.usable.startswith(MODEL_IS_WHOLE):
            return None
        rescued = shlex.quote(f"{folder.where}-rescued/{step_name(0)}")
        return f"{folder.command('convert', f'/{name}')} {rescued} --model-only"
    prune = f"{folder.command('prune')} --damaged"
    if refused or report.step in folder.marked:
        return prune
    # Of what only reading shows, `prune` knows by a mark. `verify` ends with the status of damage.
    return f"{folder.command('verify', f'/{name}')} --mark; {prune}"


def _marked(folder: Folder, name: str, step: int) -> Trouble:
    """A step that a run has found damaged, and that looks whole."""
    # Reads all of it, and takes the mark away where it is whole.
    mend = f"{folder.command('verify', f'/{name}')} --mark"
    if not folder.read:
        return Trouble("damaged", name, folder.marked[step], mend)
    what = f"{folder.marked[step]}, but every byte of it is as it was written"
    return Trouble("marked", name, what, mend)


def _space(folder: Folder, store: LocalStore) -> Iterator[Trouble]:
    """Whether the next save has room: it needs what the largest one so far has taken."""
    free = store.free_bytes()
    needed = max((report.nbytes for report in folder.reports), default=0)
    if free is not None and free < needed:
        what = f"the next save needs {spelled_bytes(needed)}, {spelled_bytes(free)} are free"
        mend = folder.command("prune --keep-latest-k 2")
        yield Trouble("space", folder.where, what, mend)


def _rights(folder: Folder) -> Iterator[Trouble]:
    path = Path(folder.where)
    if not os.access(path, os.W_OK | os.X_OK):
        mend = f"sudo chown -R {os.geteuid()} {shlex.quote(folder.where)}"
        yield Trouble("rights", folder.where, f"owned by user {path.stat().st_uid}", mend)


def _left_over(folder: Folder, store: LocalStore) -> Iterator[Trouble]:
    """What saves that were killed left; while a run is at work, what it is at."""
    lock = f"{folder.name}/{LOCK}"
    holder = store.holder(lock) if LOCK in folder.names else None
    asides = plan_cleanup(folder.names)
    if holder is not None:
        what = f"by {holder or 'a run that gives no name'}"
        yield Trouble("in use", LOCK, f"{what}, {counted(len(asides), 'folder')} on the way")
        return
    for action in asides:
        if is_at_work(store, f"{folder.name}/{action.folder}"):
            yield Trouble("in use", action.folder, "another process is at work on it")
        else:
            yield Trouble("left over", action.folder, action.why, folder.command("prune"))
    note = _note(store, lock) if LOCK in folder.names else ""
    if note and not note.startswith(f"host {os.uname().nodename},"):
        what = f"held, or left, by {note}: another machine, so nobody can tell from here"
        yield Trouble("in use", LOCK, what)
    elif note:
        yield Trouble("left over", LOCK, f"by {note}, which has died; the next run takes it over")


def _note(store: LocalStore, lock: str) -> str:
    """What the last holder of a lock has left in it."""
    folder, _, name = lock.rpartition("/")
    try:
        if store.leads_out(folder, name):
            return ""
        return store.read(lock, 0, 1024).decode(errors="replace").strip()
    except HoldfastError:
        return ""


def _unknown(folder: Folder) -> Iterator[Trouble]:
    """Folders whose names are no steps': neither read, nor counted, nor removed."""
    for name in folder.names:
        if not name.endswith("/") or step_of(name[:-1]) is not None or aside_of(name[:-1]):
            continue
        try:
            held = folder.store.list(f"{folder.name}/{name[:-1]}")
        except HoldfastError as error:
            yield Trouble("unknown", name, f"no step; {error.what}")
            continue
        if any(step_of(one.rstrip("/")) is not None for one in held):
            continue  # Steps of another kind, as `hf/`.
        if not _is_checkpoint(held):
            yield Trouble("unknown", name, "no step; Holdfast leaves it alone")
            continue
        what = "a checkpoint under a name that no resume finds and no retention counts"
        yield Trouble("unknown", name, what, _naming(folder, name[:-1]))


def _naming(folder: Folder, name: str) -> str | None:
    """The command that gives a checkpoint the name of its step, if it says which and it is free."""
    try:
        step = read_manifest(folder.store, f"{folder.name}/{name}").step
    except HoldfastError:
        return None
    if step is None or f"{step_name(step)}/" in folder.names:
        return None
    named = shlex.quote(f"{folder.where}/{step_name(step)}")
    return f"mv {shlex.quote(f'{folder.where}/{name}')} {named}"


def _is_checkpoint(names: Sequence[str]) -> bool:
    return bool({MANIFEST, METADATA} & {*names})
