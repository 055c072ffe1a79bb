"""The sync: what is shipped against what a user has, and only what is surely ours is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import ExistsError, HoldfastError, NotFoundError
from holdfast.skills.bundle import Skill
from holdfast.skills.content import Digests
from holdfast.skills.copies import Copies
from holdfast.skills.records import Ledger, SyncRecord, order_of

State = Literal["new", "outdated", "current", "modified", "deleted", "foreign", "newer"]
"""new: never offered. outdated: as it was installed, and another is shipped. current: as shipped.
modified: a shipped file was changed by the user. deleted: offered, and no longer there. foreign: a
folder of that name that no sync has made. newer: installed by a later version."""

SKIPPED: Sequence[State] = ("modified", "deleted", "foreign", "newer")
"""Whatever is shipped, the sync leaves these as they are."""


@dataclass(frozen=True, slots=True)
class SkillStates:
    """One shipped skill, and the user's copy of it."""

    name: str
    state: State
    """Before the sync."""

    problem: str | None = None
    """Why it could not be brought up to date."""


@dataclass(frozen=True, slots=True)
class Synced:
    """What a sync did; a rehearsal, what it would do."""

    root: str
    skills: tuple[SkillStates, ...] = ()
    cleaned: tuple[str, ...] = ()
    """Names that are no longer shipped: the record of them is dropped, their files stay."""

    busy: bool = False
    """Somebody else was at the same work, so nothing was done."""

    @property
    def problems(self) -> list[str]:
        return [f"{skill.name}: {skill.problem}" for skill in self.skills if skill.problem]

    def names(self, *states: State) -> list[str]:
        return [s.name for s in self.skills if s.state in states and not s.problem]

    @property
    def changes(self) -> bool:
        """Whether any copy, or the record of one, is not as it should be."""
        return bool(self.names("new", "outdated") or self.cleaned or self.problems)

    def __str__(self) -> str:
        counted = Counter(skill.state for skill in self.skills if not skill.problem)
        said = f"{counted['new']} new, {counted['outdated']} updated, {len(self.cleaned)} cleaned"
        said += f", {counted['current']} current"
        why = [f"{', '.join(self.names(s))}: {s}" for s in SKIPPED if counted[s]]
        said += f", {sum(counted[s] for s in SKIPPED)} skipped"
        return said + (f" ({'; '.join(why)})" if why else "")


def state_of(
    want: Digests, have: Digests | None, receipt: SyncRecord | None, *, offered: bool, version: str
) -> State:
    """What is so of one skill: what is shipped, what is there, and what is written down of it."""
    if have is None:
        return "deleted" if offered else "new"
    if receipt is None:
        return "current" if have == want else "foreign"
    if any(have.get(file) != known for file, known in receipt.files.items()):
        # Brought back by hand, it may be what is shipped now. Files of the user's own never count.
        restored = all(have.get(file) == known for file, known in want.items())
        return "current" if restored else "modified"
    if receipt.files == want:
        return "current"
    if order_of(receipt.version) > order_of(version):
        return "newer"
    theirs = have.keys() - receipt.files.keys()
    return "modified" if any(_in_the_way(file, want) for file in theirs) else "outdated"


def _in_the_way(theirs: str, want: Digests) -> bool:
    """Whether a user's file has the place that one of these files needs, or a folder of it."""
    return any(
        theirs == file or file.startswith(f"{theirs}/") or theirs.startswith(f"{file}/")
        for file in want
    )


def survey(skills: Mapping[str, Skill], copies: Copies, version: str) -> Synced:
    """What a sync would do. Writes nothing."""
    ledger = copies.ledger()
    found = tuple(_found(skill, copies, ledger, version) for _, skill in sorted(skills.items()))
    return Synced(str(copies.root), found, tuple(sorted(ledger.offered - skills.keys())))


def sync(skills: Mapping[str, Skill], copies: Copies, version: str) -> Synced:
    """Bring the copies up to date: new ones in, outdated ones replaced, all others left alone.

    Killed at any point, each copy is the old or the new one, and the next sync goes on.

    Raises:
        StorageError, FormatError: the record of what was offered cannot be read, or no file can be
            locked there; nothing was changed.
    """
    with copies.locked() as mine:
        if not mine:
            return Synced(str(copies.root), busy=True)
        before = survey(skills, copies, version)
        done = tuple(_bring(skills[found.name], found, copies, version) for found in before.skills)
        synced = replace(before, skills=done)
        copies.write_ledger(_after(copies.ledger(), synced))
        if not synced.problems:
            copies.write_synced(version)
        return synced


def reset(skill: Skill, copies: Copies, version: str) -> str | None:
    """Put the shipped skill in place, whatever was done to the copy. Returns where what the user
    had changed is kept.

    Raises:
        ExistsError: what is there was not made by a sync, or another sync is at work.
    """
    with copies.locked() as mine:
        state = _ours(skill.name, _found(skill, copies, copies.ledger(), version), copies, mine)
        kept = _kept(skill.name, copies) if state not in ("new", "deleted") else None
        copies.put(skill, version)
        ledger = copies.ledger()
        offered, removed = ledger.offered | {skill.name}, ledger.removed - {skill.name}
        copies.write_ledger(Ledger(offered, removed))
        return kept


def remove(skill: Skill, copies: Copies, version: str) -> str | None:
    """Take a copy away, for ever: no sync installs it again. Returns where what the user had
    changed is kept.

    Raises:
        ExistsError: what is there was not made by a sync, or another sync is at work.
    """
    with copies.locked() as mine:
        state = _ours(skill.name, _found(skill, copies, copies.ledger(), version), copies, mine)
        ledger = copies.ledger()
        offered, removed = ledger.offered - {skill.name}, ledger.removed | {skill.name}
        copies.write_ledger(Ledger(offered, removed))
        if state in ("new", "deleted"):
            return None
        kept = _kept(skill.name, copies)
        copies.remove(skill.name)
        return kept


def _found(skill: Skill, copies: Copies, ledger: Ledger, version: str) -> SkillStates:
    offered = skill.name in ledger.offered | ledger.removed
    try:
        have, receipt = copies.held(skill.name), copies.receipt(skill.name)
    except HoldfastError as error:
        return SkillStates(skill.name, "modified", error.what)
    return SkillStates(
        skill.name,
        state_of(skill.digests, have, receipt, offered=offered, version=version),
    )


def _bring(skill: Skill, found: SkillStates, copies: Copies, version: str) -> SkillStates:
    """Bring one copy up to date, where that is the sync's business."""
    try:
        if not found.problem and found.state in ("new", "outdated"):
            copies.put(skill, version)
        elif found.state == "current":
            receipt = copies.receipt(skill.name)
            if receipt is None or receipt.files != skill.digests:
                copies.write_receipt(skill.name, SyncRecord(version, skill.digests))
    except HoldfastError as error:
        return replace(found, problem=error.what)
    return found


def _after(ledger: Ledger, synced: Synced) -> Ledger:
    """What is to be remembered after a sync."""
    there = set(synced.names("new", "outdated", "current", "modified", "newer"))
    cleaned = {*synced.cleaned}
    # Their files stay; should the user delete them, a version that ships them again must not bring
    # them back.
    return Ledger((ledger.offered | there) - cleaned, (ledger.removed - there) | cleaned)


def _ours(name: str, found: SkillStates, copies: Copies, mine: bool) -> State:
    """The state of a copy that may be changed because its user has said so."""
    where = copies.place(name)
    if not mine:
        raise ExistsError(f"another sync is at work in `{copies.root}`", hint="wait for it")
    if found.problem:
        raise ExistsError(found.problem)
    if found.state == "foreign":
        raise ExistsError(
            f"`{where}` was not made by holdfast, and is not touched",
            hint=f"move it away, then: holdfast skills reset {name}",
        )
    return found.state


def _kept(name: str, copies: Copies) -> str | None:
    """Archive a copy that is not, to the last file, what was installed."""
    receipt = copies.receipt(name)
    if receipt is not None and copies.held(name) == receipt.files:
        return None
    return str(copies.keep(copies.place(name), name))


def known(name: str, skills: Mapping[str, Skill]) -> Skill:
    """The shipped skill of that name.

    Raises:
        NotFoundError: none has it.
    """
    if name not in skills:
        raise NotFoundError(f"no skill is named `{name}`", hint=f"shipped: {', '.join(skills)}")
    return skills[name]
