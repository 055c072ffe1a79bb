"""Compare a user's copies with the shipped skills, and update those the user has not changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import ExistsError, HoldfastError
from holdfast.skills.bundle import Skill
from holdfast.skills.copies import Copies
from holdfast.skills.records import Digests, Ledger, SyncRecord, order_of

State = Literal["new", "outdated", "current", "modified", "deleted", "foreign", "newer"]
"""State of a copy. new: never installed. outdated: unchanged, and the shipped skill is newer.
current: equal to the shipped skill. modified: the user changed a shipped file. deleted: the user
deleted the copy. foreign: no sync made the folder. newer: a later version of Holdfast installed
the copy."""

SKIPPED: Sequence[State] = ("modified", "deleted", "foreign", "newer")
"""States of copies that a sync leaves alone."""


@dataclass(frozen=True, slots=True)
class SyncedSkill:
    """One shipped skill, and the state of the user's copy."""

    name: str
    state: State
    """State before the sync."""

    problem: str | None = None
    """Reason why the copy could not be brought up to date."""


@dataclass(frozen=True, slots=True)
class Synced:
    """Result of `sync`, or of `survey`."""

    root: str
    skills: tuple[SyncedSkill, ...] = ()
    cleaned: tuple[str, ...] = ()
    """Names of installed skills that are no longer shipped, unless a later version installed them.
    The sync keeps their files, and records the skills as removed."""

    busy: bool = False
    """Whether another sync was in progress, so that this one did nothing."""

    @property
    def problems(self) -> list[str]:
        """Reasons why copies could not be brought up to date, each with the name of the skill."""
        return [f"{skill.name}: {skill.problem}" for skill in self.skills if skill.problem]

    def names(self, *states: State) -> list[str]:
        return [skill.name for skill in self.skills if skill.state in states and not skill.problem]

    @property
    def changes(self) -> bool:
        """Whether the sync changed a copy, or the record of installed skills, or had a problem."""
        return bool(self.names("new", "outdated") or self.cleaned or self.problems)

    def __str__(self) -> str:
        changed = {"new": self.names("new"), "updated": self.names("outdated")}
        parts = [_counted(word, names) for word, names in changed.items()]
        parts += [_counted("cleaned", self.cleaned), f"{len(self.names('current'))} current"]
        skipped = f"{len(self.names(*SKIPPED))} skipped"
        why = [f"{', '.join(names)}: {s}" for s in SKIPPED if (names := self.names(s))]
        parts.append(skipped + (f" ({'; '.join(why)})" if why else ""))
        return ", ".join(parts)


def _counted(word: str, names: Sequence[str]) -> str:
    return f"{len(names)} {word}" + (f" ({', '.join(names)})" if names else "")


def _state_of(skill: Skill, copies: Copies, ledger: Ledger, version: str) -> State:
    wanted, copied = skill.digests, copies.digests(skill.name)
    receipt = copies.receipt(skill.name)
    if copied is None:
        return "deleted" if skill.name in ledger.offered | ledger.removed else "new"
    if receipt is None:
        return "current" if copied == wanted else "foreign"
    if not receipt.files.items() <= copied.items():
        # The copy differs from its receipt, but the user may have restored the shipped files by
        # hand. Files that the user added do not count.
        return "current" if wanted.items() <= copied.items() else "modified"
    if receipt.files == wanted:
        return "current"
    if _is_newer(receipt, version):
        return "newer"
    users_files = copied.keys() - receipt.files.keys()
    return "modified" if any(_in_the_way(file, wanted) for file in users_files) else "outdated"


def _is_newer(receipt: SyncRecord, version: str) -> bool:
    """Whether a version of Holdfast later than `version` installed the copy."""
    return order_of(receipt.version) > order_of(version)


def _is_cleaned(name: str, copies: Copies, version: str) -> bool:
    """Whether to record an installed skill as removed, since `version` does not ship it.

    False if a later version of Holdfast has installed it.
    """
    receipt = copies.receipt(name)
    return receipt is None or not _is_newer(receipt, version)


def _in_the_way(users_file: str, wanted: Digests) -> bool:
    """Whether a user's file prevents the installation of a shipped file, one of `wanted`."""
    return any(
        users_file == file or file.startswith(f"{users_file}/") or users_file.startswith(f"{file}/")
        for file in wanted
    )


def survey(skills: Mapping[str, Skill], copies: Copies, version: str) -> Synced:
    """Return the result that `sync` would have with the same arguments. Write nothing."""
    ledger = copies.ledger()
    states = tuple(_examined(skill, copies, ledger, version) for _, skill in sorted(skills.items()))
    missing = sorted(ledger.offered - skills.keys())
    cleaned = (name for name in missing if _is_cleaned(name, copies, version))
    return Synced(str(copies.root), states, tuple(cleaned))


def sync(skills: Mapping[str, Skill], copies: Copies, version: str) -> Synced:
    """Install new skills, replace outdated copies, and leave all other copies alone.

    `skills`: shipped skills by name. `version`: the installed version of Holdfast.

    If the process is killed, each copy is either old or new as a whole. The next sync continues.

    Raises:
        StorageError, FormatError: the ledger cannot be read, or the folder cannot be locked. In
            both cases, nothing was changed.
    """
    with copies.locked() as locked:
        if not locked:
            return Synced(str(copies.root), busy=True)
        before = survey(skills, copies, version)
        updated = [_updated(skills[one.name], one, copies, version) for one in before.skills]
        synced = replace(before, skills=tuple(updated))
        present = set(synced.names("new", "outdated", "current", "modified", "newer"))
        cleaned, ledger = {*synced.cleaned}, copies.ledger()
        # Skills in `cleaned` count as removed. If the user deletes the files of such a skill, a
        # version that ships it again must not bring the files back.
        offered = (ledger.offered | present) - cleaned
        removed = (ledger.removed - present) | cleaned
        copies.write_ledger(Ledger(offered=offered, removed=removed))
        if not synced.problems:
            copies.write_synced(version)
        return synced


def reset(skill: Skill, copies: Copies, version: str) -> str | None:
    """Replace a copy by the shipped skill, unless no sync made the copy (state `foreign`).

    If the user had changed the copy, archive it first, and return the path of the archive.

    Raises:
        ExistsError: the folder is foreign, or another sync is at work.
    """
    with _archived(skill, copies, version) as archive:
        copies.install(skill, version)
        ledger = copies.ledger()
        copies.write_ledger(Ledger(ledger.offered | {skill.name}, ledger.removed - {skill.name}))
        return archive


def remove(skill: Skill, copies: Copies, version: str) -> str | None:
    """Delete a copy for good: no sync installs it again. Result and errors are as for `reset`."""
    with _archived(skill, copies, version) as archive:
        ledger = copies.ledger()
        copies.write_ledger(Ledger(ledger.offered - {skill.name}, ledger.removed | {skill.name}))
        copies.remove(skill.name)
        return archive


@contextmanager
def _archived(skill: Skill, copies: Copies, version: str) -> Iterator[str | None]:
    """Context in which the folder of skills is locked.

    If the user has changed the copy of `skill`, archive it, and yield the path of the archive. Else
    yield None.
    """
    with copies.locked() as locked:
        if not locked:
            raise ExistsError(f"another sync is at work in `{copies.root}`", hint="wait for it")
        before = _examined(skill, copies, copies.ledger(), version)
        folder, receipt = copies.folder(skill.name), copies.receipt(skill.name)
        if before.problem:
            raise ExistsError(before.problem)
        if before.state == "foreign":
            raise ExistsError(
                f"`{folder}` was not made by holdfast, and is not touched",
                hint=f"move it away, then: holdfast skills reset {skill.name}",
            )
        copied = copies.digests(skill.name)
        unchanged = copied is None or (receipt is not None and copied == receipt.files)
        yield None if unchanged else str(copies.archive(folder, skill.name))


def _examined(skill: Skill, copies: Copies, ledger: Ledger, version: str) -> SyncedSkill:
    try:
        return SyncedSkill(skill.name, _state_of(skill, copies, ledger, version))
    except HoldfastError as error:
        return SyncedSkill(skill.name, "modified", error.what)


def _updated(skill: Skill, before: SyncedSkill, copies: Copies, version: str) -> SyncedSkill:
    """Bring the copy of a skill up to date, unless its state is in `SKIPPED`.

    Return `before`, the state of the copy. If the copy cannot be updated, add the problem.
    """
    try:
        if not before.problem and before.state in ("new", "outdated"):
            copies.install(skill, version)
        elif before.state == "current":
            receipt = copies.receipt(skill.name)
            if receipt is None or receipt.files != skill.digests:
                copies.write_receipt(skill, version)
    except HoldfastError as error:
        return replace(before, problem=error.what)
    return before
