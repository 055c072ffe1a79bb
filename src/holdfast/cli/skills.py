"""`holdfast skills`: guides for coding agents, and a user's copies of them."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from holdfast.cli.terminal import parsed, say, say_json, say_table, verb_in
from holdfast.errors import ExistsError, MismatchError, NotFoundError, StorageError
from holdfast.release import installed_version
from holdfast.skills import sync as syncing
from holdfast.skills.bundle import ENTRY, Skill, shipped
from holdfast.skills.copies import Copies
from holdfast.skills.targets import all_targets, target_of
from holdfast.storage.opening import local_path

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, slots=True)
class SkillsWhere:
    """A folder of skills."""

    to: str = "agents"
    """agents (~/.agents/skills), claude (~/.claude/skills), codex, hermes, or a path."""

    project: bool = False
    """In the current repository, not in the home directory."""

    @property
    def copies(self) -> Copies:
        """The copies there."""
        here, environment = Path(local_path(".")), os.environ
        target = target_of(self.to, project=self.project, environment=environment, here=here)
        return Copies(target.root, categories=target.categories)


There = tyro.conf.OmitArgPrefixes[SkillsWhere]


@dataclass(frozen=True, slots=True)
class SkillsList:
    """The skills that are shipped, and the state of your copy of each.

    Example: holdfast skills list
    """

    where: There = SkillsWhere()
    """Your copies."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsShow:
    """One skill as it is shipped: its entry page, or another of its files.

    Example: holdfast skills show holdfast references/resume.md
    """

    name: Name
    """Of the skill."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = ENTRY
    """Below its folder."""

    json: bool = False
    """Print JSON, with the names of all files."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsSync:
    """Bring your copies up to date: new skills are copied, those that are as they were installed
    are replaced; what you changed, deleted or wrote yourself is left alone. From the first sync on,
    training starts with a quiet one.

    Example: holdfast skills sync --to claude
    """

    where: There = SkillsWhere()
    """Your copies."""

    dry_run: bool = False
    """Say what would be done."""

    check: bool = False
    """As --dry-run, and exit with 6 where anything would be done."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsUpdate:
    """Bring your copies up to date wherever you have synced them by a name: agents, claude, ...

    Example: holdfast skills update
    """

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsDiff:
    """What is shipped against your copy: what a reset would change.

    Example: holdfast skills diff holdfast
    """

    name: Name
    """Of the skill."""

    where: There = SkillsWhere()
    """Your copies."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsReset:
    """Put the shipped skill in place of your copy, which is archived first if you changed it.

    Example: holdfast skills reset holdfast
    """

    name: Name
    """Of the skill."""

    where: There = SkillsWhere()
    """Your copies."""

    debug: bool = False
    """On an error, print where it came from."""


@dataclass(frozen=True, slots=True)
class SkillsRemove:
    """Take your copy away, archived first if you changed it. No sync brings it back; `reset` does.

    Example: holdfast skills remove holdfast
    """

    name: Name
    """Of the skill."""

    where: There = SkillsWhere()
    """Your copies."""

    debug: bool = False
    """On an error, print where it came from."""


VERBS = {
    "list": "the skills that are shipped, and the state of your copies",
    "show": "one of them, as it is shipped",
    "sync": "copy new ones, replace outdated ones",
    "update": "the same, wherever you have synced before",
    "diff": "what is shipped against your copy",
    "reset": "put the shipped one in place of your copy",
    "remove": "take your copy away, for good",
}

EXAMPLE = "holdfast skills sync"


def run(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit status."""
    verb = verb_in("holdfast skills", VERBS, arguments, "Guides for coding agents.", EXAMPLE)
    if verb is None:
        return 0
    verbs: Mapping[str, Callable[[Sequence[str]], None]] = {
        "list": _list,
        "show": _show,
        "sync": _sync,
        "update": _update,
        "diff": _diff,
        "reset": _reset,
        "remove": _remove,
    }
    verbs[verb](arguments[1:])
    return 0


def _list(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsList, "skills list", arguments)
    skills, copies = shipped(), asked.where.copies
    found = syncing.survey(skills, copies, installed_version()).skills
    if asked.json:
        described = {name: skill.description for name, skill in skills.items()}
        listed = [asdict(one) | {"description": described[one.name]} for one in found]
        say_json({"folder": str(copies.root), "skills": listed})
        return
    rows = [(one.name, one.state, skills[one.name].description.partition(". ")[0]) for one in found]
    say_table(("skill", "your copy", "what it is for"), rows)


def _show(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsShow, "skills show", arguments)
    skill = syncing.known(asked.name, shipped())
    if asked.file not in skill.files:
        near = difflib.get_close_matches(asked.file, skill.files, n=1)
        raise NotFoundError(
            f"skill `{skill.name}` has no file `{asked.file}`",
            hint=f"did you mean `{near[0]}`?" if near else f"files: {', '.join(skill.files)}",
        )
    text = skill.files[asked.file].decode()
    if asked.json:
        body = {"name": skill.name, "file": asked.file, "text": text, "files": [*skill.files]}
        say_json(body)
    else:
        sys.stdout.write(text)


def _sync(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsSync, "skills sync", arguments)
    rehearsal = asked.dry_run or asked.check
    work = syncing.survey if rehearsal else syncing.sync
    done = work(shipped(), asked.where.copies, installed_version())
    _say_synced([done], json=asked.json)
    if asked.check and done.changes:
        raise MismatchError(f"`{done.root}` is not up to date", hint="holdfast skills sync")


def _update(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsUpdate, "skills update", arguments)
    targets = all_targets(os.environ, Path(local_path(".")))
    every = [Copies(target.root, categories=target.categories) for target in targets]
    agreed = [copies for copies in every if copies.state.is_dir()]
    if not agreed:
        raise NotFoundError("no folder of skills was synced yet", hint="holdfast skills sync")
    version = installed_version()
    _say_synced([syncing.sync(shipped(), copies, version) for copies in agreed], json=asked.json)


def _say_synced(synced: Sequence[syncing.Synced], *, json: bool) -> None:
    if json:
        say_json([asdict(one) for one in synced])
    for one in synced:
        if not json and not one.busy:
            say(f"{one.root}: {one}")
    if any(one.busy for one in synced):
        raise ExistsError("another sync is at work on the same skills", hint="sync again after it")
    problems = [problem for one in synced for problem in one.problems]
    if problems:
        raise StorageError("some skills are not up to date:\n  " + "\n  ".join(problems))


def _diff(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsDiff, "skills diff", arguments)
    skill, copies = syncing.known(asked.name, shipped()), asked.where.copies
    changed = _changes(skill, copies)
    if asked.json:
        say_json({"name": skill.name, "files": changed})
        return
    for lines in changed.values():
        sys.stdout.write(lines)


def _changes(skill: Skill, copies: Copies) -> dict[str, str]:
    """File to what differs in the user's copy, as a unified diff."""
    held, place = copies.held(skill.name), copies.place(skill.name)
    if held is None:
        raise NotFoundError(f"there is no `{place}`", hint=f"holdfast skills reset {skill.name}")
    found = {}
    for file in sorted(skill.files):
        if held.get(file) == skill.digests[file]:
            continue
        try:
            mine = (place / file).read_text(errors="replace").splitlines(keepends=True)
        except OSError:
            mine = []
        theirs = skill.files[file].decode(errors="replace").splitlines(keepends=True)
        found[file] = "".join(
            difflib.unified_diff(mine, theirs, f"yours/{file}", f"shipped/{file}")
        )
    return found


def _reset(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsReset, "skills reset", arguments)
    skill, copies = syncing.known(asked.name, shipped()), asked.where.copies
    kept = syncing.reset(skill, copies, installed_version())
    say(f"{copies.place(skill.name)} is as shipped" + (f"; yours: {kept}" if kept else ""))


def _remove(arguments: Sequence[str]) -> None:
    asked = parsed(SkillsRemove, "skills remove", arguments)
    skill, copies = syncing.known(asked.name, shipped()), asked.where.copies
    kept = syncing.remove(skill, copies, installed_version())
    say(f"{copies.place(skill.name)} is gone for good" + (f"; yours: {kept}" if kept else ""))
