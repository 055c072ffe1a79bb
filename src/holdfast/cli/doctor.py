"""`holdfast doctor`: problems in a folder of checkpoints, and the command that fixes each."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from holdfast.catalog.catalog import Catalog, location, read_manifest, steps_in
from holdfast.catalog.cleanup import is_at_work, plan_cleanup
from holdfast.catalog.findings import MODEL_IS_WHOLE, Finding, VerifyReport, misnumbered, summary_of
from holdfast.catalog.listing import hint_without_steps, shared_files
from holdfast.catalog.marks import damaged_steps
from holdfast.catalog.open_any import check_exists, check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.tier import read_tier
from holdfast.cli.rights import missing_right
from holdfast.cli.terminal import POSITIONAL, JsonOptions, parsed, say, say_json, spelled_resume
from holdfast.cli.verify import resumable, resumable_here, verified
from holdfast.errors import DamagedError, FormatError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import (
    LOCK,
    MANIFEST,
    METADATA,
    TIER,
    hidden_folder_of,
    rank_and_number,
    step_name,
    step_of,
)
from holdfast.format.seal import SEAL
from holdfast.spelling import counted, spelled_bytes
from holdfast.storage.bucket_leases import NOTE_BYTES_MAX, note_in
from holdfast.storage.local import LocalStore
from holdfast.storage.locks import read_note
from holdfast.storage.objects import ObjectStore
from holdfast.storage.opening import folder_store, is_url
from holdfast.storage.store import ReadStore, Store

Concern = Literal[
    "damaged", "unreadable", "marked", "space", "rights", "left over", "in use", "unknown"
]

WITHOUT_MEND = {
    "damaged": "no command repairs it: restore it from a copy, or start from other weights",
    "unreadable": "nothing shows that it is damaged: keep it, and make its files readable",
    "rights": "look at the attributes and the ACL of the folder: lsattr -d, getfacl",
}
"""Advice for problems that no command fixes, by kind of problem: see `Trouble.concern`."""


@dataclass(frozen=True, slots=True)
class DoctorArguments(JsonOptions):
    """Find problems in a run's checkpoint folder, and the command that fixes each: damaged
    checkpoints, leftovers of killed saves, local checkpoints that no restart needs, locks, space,
    permissions, checkpoints under names that no resume finds. Exits with 7 where a checkpoint is
    damaged, with 9 where files cannot be read or a save would fail.

    Example: holdfast doctor outputs/checkpoint
    """

    folder: str = field(metadata=POSITIONAL)
    """Path or URL of a folder of checkpoints."""

    verify: bool = False
    """Read all data. Without it only indexes and file sizes are checked, which do not show damaged
    data."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One problem in a folder, or a fact that the owner of the folder should know."""

    concern: Concern
    where: str
    """Name of the checkpoint, file or folder."""

    what: str
    mend: str | None = None
    """Command that fixes the problem; None if no command does, or nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class ExaminedFolder:
    """A folder of checkpoints, and the findings in it."""

    store: ReadStore
    name: str
    names: Sequence[str]
    """Names of the files and folders in this folder. Names of folders end in `/`."""

    reports: Sequence[VerifyReport]
    marked: Mapping[int, str]
    """Steps that are marked as damaged, with the note in the mark."""

    read: bool = False
    """Whether all data was read."""

    @property
    def resume(self) -> int | None:
        """Step that a resume on this host would load, from this folder or from the fast tier."""
        return resumable_here(self.store, self.name, self.reports, self.marked)

    @property
    def durable(self) -> int | None:
        """Newest step in this folder that a resume could load."""
        return resumable(self.reports, self.marked)

    @property
    def where(self) -> str:
        return location(self.store, self.name)

    def command(self, command: str, below: str = "") -> str:
        """Return the command line `holdfast COMMAND FOLDER`. `below` is appended to FOLDER."""
        return f"holdfast {command} {shlex.quote(self.where + below)}"


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast doctor`: print the problems of a folder. Return the exit status."""
    options = parsed(DoctorArguments, "doctor", arguments)
    folder = _examined(options.folder, quick=not options.verify)
    troubles, resume = [*examine(folder)], folder.resume
    advice = lifecycle_rule(folder.where)
    if options.json:
        facts = {"folder": folder.where, "resume": resume, "read": folder.read}
        facts |= {} if advice is None else {"lifecycle_rule": advice}
        say_json(facts | {"troubles": [asdict(trouble) for trouble in troubles]})
    else:
        checkpoints = counted(len(folder.reports), "checkpoint")
        say(f"{folder.where}: {checkpoints}, {spelled_resume(resume)}")
        for trouble in troubles:
            say(f"  {trouble.concern}: {trouble.where}: {trouble.what}")
            say(f"    {trouble.mend or WITHOUT_MEND.get(trouble.concern, 'nothing to do')}")
        if not troubles:
            say("  no problems" + ("" if folder.read else " in indexes and file sizes"))
        if advice is not None:
            say(
                "  parts of killed uploads are not shown here: no request of Holdfast lists them. "
                "The bucket should have this rule, which deletes them after a day; this command "
                f"replaces all others:\n    {advice}"
            )
        if not folder.read:
            say(f"  no data was read: {folder.command('doctor')} --verify reads all of it")
    concerns = {trouble.concern for trouble in troubles}
    if "damaged" in concerns:
        raise DamagedError(f"`{folder.where}` holds damaged checkpoints")
    if "unreadable" in concerns:
        raise StorageError(f"`{folder.where}` holds checkpoints that cannot be read")
    if concerns & {"space", "rights"}:
        raise StorageError(f"a save into `{folder.where}` would fail")
    return 0


def _examined(path: str, *, quick: bool) -> ExaminedFolder:
    store, name = open_for_reading(path)
    check_exists(store, name)
    check_folder(store, name)
    names, checkpoints = store.list(name), steps_in(store, name)
    leftovers = [listed for listed in names if hidden_folder_of(listed.rstrip("/")) is not None]
    if not checkpoints and not leftovers and LOCK not in names:
        raise NotFoundError(
            f"`{location(store, name)}` is not a folder of checkpoints",
            hint=hint_without_steps(store, name, names),
        )
    reports = [*verified(store, checkpoints, quick).values()]
    return ExaminedFolder(store, name, names, reports, damaged_steps(store, name), read=not quick)


def examine(folder: ExaminedFolder) -> Iterator[Trouble]:
    """Yield the problems of a folder, the most important first."""
    yield from _damaged(folder)
    if isinstance(folder.store, LocalStore):
        yield from _space(folder, folder.store)
        yield from _rights(folder)
    if isinstance(folder.store, LocalStore | ObjectStore):
        yield from _left_over(folder, folder.store)
        yield from _local(folder, folder.store)
    yield from _unknown(folder)


def lifecycle_rule(url: str) -> str | None:
    """Return the command that makes a bucket delete the parts of killed uploads after a day.

    Return None if the store deletes them by itself, or is not a bucket. The rule must not delete
    complete objects, since the checkpoints consist of them.
    """
    scheme, _, path = url.partition("://")
    bucket = path.partition("/")[0]
    if scheme in ("s3", "s3a"):
        rule = {
            "ID": "holdfast-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
        }
        return (
            f"aws s3api put-bucket-lifecycle-configuration --bucket {shlex.quote(bucket)} "
            f"--lifecycle-configuration {shlex.quote(json.dumps({'Rules': [rule]}))}"
        )
    if scheme == "gs":
        abort = {"type": "AbortIncompleteMultipartUpload"}
        rules = json.dumps({"rule": [{"action": abort, "condition": {"age": 1}}]})
        return (
            f"gcloud storage buckets update {shlex.quote(f'gs://{bucket}')} "
            f"--lifecycle-file=<(echo {shlex.quote(rules)})"
        )
    return None


def _damaged(folder: ExaminedFolder) -> Iterator[Trouble]:
    resume = folder.resume
    for report in folder.reports:
        name = report.where.rpartition("/")[2]
        if not report.findings:
            if report.step is not None and report.step in folder.marked:
                yield _marked(folder, name, report.step)
            continue
        if unread := [finding for finding in report.findings if finding.unreadable]:
            yield _unreadable(folder, report, name, unread)
        if not report.damaged:
            continue
        what = summary_of([finding for finding in report.findings if not finding.unreadable])
        if report.usable not in ("nothing", "everything"):
            what += f"; usable: {report.usable}"
        if resume is not None:
            what += f"; a resume skips it, and takes step {resume}"
        # `prune` deletes no checkpoint with files that cannot be read.
        yield Trouble("damaged", name, what, None if unread else _mend(folder, report, name))


def _unreadable(
    folder: ExaminedFolder, report: VerifyReport, name: str, findings: Sequence[Finding]
) -> Trouble:
    """Return the problem of a checkpoint with files that cannot be read: what prevents it, and the
    command that ends it."""
    what, mend = summary_of(findings), None
    if isinstance(folder.store, LocalStore):
        # The finding is about the folder itself if that cannot be listed.
        file = "" if findings[0].file == name else findings[0].file
        missing = missing_right(Path(report.where, file))
        if missing is not None:
            what, mend = f"{what}; {missing.what}", missing.mend
    if mend is None and findings[0].hint is not None:
        what += f"; {findings[0].hint}"
    return Trouble("unreadable", name, what, mend)


def _mend(folder: ExaminedFolder, report: VerifyReport, name: str) -> str | None:
    """Return the command that fixes a damaged checkpoint; None if no command does.

    If Holdfast can load the checkpoint, the command converts it to a new one. Else, if a resume can
    load another checkpoint of the folder, the command removes this one. Else it copies only the
    model, if that is undamaged.
    """
    if report.loads:
        # Holdfast can load it: only bytes that stock torch needs are damaged. A conversion to a new
        # copy writes these bytes again.
        copy = shlex.quote(f"{folder.where}-rescued/{name}")
        return f"{folder.command('convert', f'/{name}')} {copy}"
    if report.format == "sealed":
        # A sealed folder cannot be used in part, so delete it: by `rm`, since `prune` reads no data
        # and may miss the damage.
        return None if folder.durable is None else f"rm -r {shlex.quote(report.where)}"
    refused = any(finding.concern in ("index", "file") for finding in report.findings)
    if folder.durable is None:
        if refused or not report.usable.startswith(MODEL_IS_WHOLE):
            return None
        rescued = shlex.quote(f"{folder.where}-rescued/{step_name(0)}")
        return f"{folder.command('convert', f'/{name}')} {rescued} --model-only"
    prune = f"{folder.command('prune')} --damaged"
    if refused or report.step in folder.marked:
        return prune
    # `prune` reads no data, so it needs the mark to see the damage. The commands are joined by `;`
    # and not by `&&`, since `verify` exits with 7.
    return f"{folder.command('verify', f'/{name}')} --mark; {prune}"


def _marked(folder: ExaminedFolder, name: str, step: int) -> Trouble:
    """Return the problem of a checkpoint that is marked as damaged, but has no known damage."""
    # This command reads all data, and deletes the mark if nothing is damaged.
    mend = f"{folder.command('verify', f'/{name}')} --mark"
    if not folder.read:
        # If data is damaged, the mark stays, and only the second command helps.
        then, option = ("doctor", "verify") if folder.durable is None else ("prune", "damaged")
        mend = f"{mend}; {folder.command(then)} --{option}"
        return Trouble("damaged", name, folder.marked[step], mend)
    what = f"{folder.marked[step]}, but now every byte matches its checksum"
    return Trouble("marked", name, what, mend)


def _space(folder: ExaminedFolder, store: LocalStore) -> Iterator[Trouble]:
    """Yield a problem if less space is free than the largest checkpoint needs.

    Files that a checkpoint shares with others do not count.
    """
    free = store.free_bytes()
    # A checkpoint that is smaller than the free space cannot need more. Skip it, since the search
    # for shared files is slow.
    large = [report for report in folder.reports if free is not None and report.nbytes > free]
    needed = max((_own_bytes(store, report) for report in large), default=0)
    if free is not None and free < needed:
        what = f"the next save needs {spelled_bytes(needed)}, {spelled_bytes(free)} are free"
        mend = folder.command("prune --keep-latest-k 2")
        yield Trouble("space", folder.where, what, mend)


def _own_bytes(store: LocalStore, report: VerifyReport) -> int:
    """Return the total size of the files that a checkpoint shares with no other checkpoint."""
    shared = 0
    folder = os.path.relpath(report.where, store.url)
    with suppress(HoldfastError):
        files = [file for file in store.list(folder) if rank_and_number(file) is not None]
        for file in shared_files(store, folder, files):
            shared += store.size(f"{folder}/{file}")
    return report.nbytes - shared


def _rights(folder: ExaminedFolder) -> Iterator[Trouble]:
    missing = missing_right(Path(folder.where), writes=True)
    if missing is not None:
        yield Trouble("rights", folder.where, missing.what, missing.mend)


def _left_over(folder: ExaminedFolder, store: Store) -> Iterator[Trouble]:
    """Yield a problem for each leftover of a killed save, and for a lock that is held or was left.

    While a run holds the lock of the folder, yield only the lock.
    """
    lock = f"{folder.name}/{LOCK}"
    holder = store.holder(lock) if LOCK in folder.names else None
    actions = plan_cleanup(folder.names)
    if holder is not None:
        by = f"by {holder or 'a run that gives no name'}"
        yield Trouble("in use", LOCK, f"{by}, {counted(len(actions), 'folder')} in progress")
        return
    for action in actions:
        if is_at_work(store, f"{folder.name}/{action.folder}"):
            yield Trouble("in use", action.folder, "another process is at work on it")
        else:
            yield Trouble("left over", action.folder, action.why, folder.command("prune"))
    if LOCK in folder.names and not isinstance(store, LocalStore):
        what = f"by {note_in(store.read(lock, 0, NOTE_BYTES_MAX))}, which no longer renews it"
        yield Trouble("left over", LOCK, f"{what}; the next run takes it over")
        return
    note = read_note(f"{folder.where}/{LOCK}")
    if note and not note.startswith(f"host {os.uname().nodename},"):
        what = f"held or left by {note}: another machine, whose processes cannot be seen from here"
        yield Trouble("in use", LOCK, what)
    elif note:
        what = f"by {note}, which has ended; the next run takes it over"
        yield Trouble("left over", LOCK, what)


def _local(folder: ExaminedFolder, store: Store) -> Iterator[Trouble]:
    """Yield a problem for each folder of the fast tier that no restart needs, or that another host
    has written: a restart finds that folder only on that host.

    Search only the folders that this machine sees. While a run holds the lock, yield nothing.
    """
    if LOCK in folder.names and store.holder(f"{folder.name}/{LOCK}") is not None:
        return
    try:
        record = read_tier(store, folder.name)
    except FormatError as error:
        yield Trouble("left over", TIER, error.what, _deletion(f"{folder.where}/{TIER}"))
        return
    for host, path in ({} if record is None else record.folders_here()).items():
        with suppress(HoldfastError):
            newest = max(Catalog(folder_store(path)).steps(), default=-1)
            if newest <= (-1 if folder.durable is None else folder.durable):
                what = f"checkpoints of host {host}, none of them newer than step {folder.durable}"
                yield Trouble("left over", path, what, _deletion(path))
            elif host != os.uname().nodename:
                what = f"step {newest} of host {host}: a restart finds it on a host of that name"
                yield Trouble("unknown", path, what)


def _deletion(path: str) -> str | None:
    return None if is_url(path) else f"rm -r {shlex.quote(path)}"


def _unknown(folder: ExaminedFolder) -> Iterator[Trouble]:
    """Yield a problem for each folder that is ignored because of its name, by resumes and by
    retention: copies of checkpoints under another step, and names other than `step-N`.

    Sealed folders, and other folders of checkpoints, are left out.
    """
    for report in folder.reports:
        name = report.where.rpartition("/")[2]
        what = None if report.findings else _why_wrong_step(folder, name)
        if what is not None:
            yield Trouble("unknown", name, what, _renaming(folder, name))
    for name in folder.names:
        if not name.endswith("/") or step_of(name[:-1]) is not None or hidden_folder_of(name[:-1]):
            continue
        try:
            below = folder.store.list(f"{folder.name}/{name[:-1]}")
        except HoldfastError as error:
            yield Trouble("unknown", name, f"not a checkpoint; {error.what}")
            continue
        if any(step_of(listed.rstrip("/")) is not None for listed in below):
            continue  # This is another folder of checkpoints, such as `hf/`.
        if SEAL in below:
            continue
        if any(report.format == "sealed" for report in folder.reports):
            yield Trouble("unknown", name, "has no seal, so that nothing can check it")
            continue
        if not {MANIFEST, METADATA} & {*below}:
            yield Trouble("unknown", name, "not a checkpoint; Holdfast leaves it alone")
            continue
        what = "a checkpoint under a name that no resume finds and no retention counts"
        yield Trouble("unknown", name, what, _renaming(folder, name[:-1]))


def _why_wrong_step(folder: ExaminedFolder, name: str) -> str | None:
    """Return the problem of a checkpoint whose own step is not the one in its name; None if both
    agree."""
    step = step_of(name)
    try:
        manifest = read_manifest(folder.store, f"{folder.name}/{name}", entries=False)
    except HoldfastError:
        return None  # It is no checkpoint of Holdfast, and so has no step of its own.
    wrong = None if step is None else misnumbered(step, manifest)
    return None if wrong is None else f"{wrong}; no resume finds it, and no retention counts it"


def _renaming(folder: ExaminedFolder, name: str) -> str | None:
    """Return the command that renames a checkpoint to `step-N`; None if N is unknown or taken."""
    try:
        step = read_manifest(folder.store, f"{folder.name}/{name}").step
    except HoldfastError:
        return None
    if step is None or f"{step_name(step)}/" in folder.names:
        return None
    target = shlex.quote(f"{folder.where}/{step_name(step)}")
    return f"mv {shlex.quote(f'{folder.where}/{name}')} {target}"
