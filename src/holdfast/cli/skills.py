"""`holdfast skills`: install skills, which are guides for coding agents, and update the copies."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from holdfast.arguments import nearest
from holdfast.cli.terminal import (
    POSITIONAL,
    JsonOptions,
    Options,
    command_in,
    parsed,
    say,
    say_json,
    say_table,
)
from holdfast.errors import ExistsError, MismatchError, NotFoundError, StorageError
from holdfast.release import installed_version
from holdfast.skills import sync
from holdfast.skills.bundle import ENTRY, Skill, shipped, shipped_skill
from holdfast.skills.copies import Copies
from holdfast.skills.targets import all_targets, target_of
from holdfast.storage.opening import local_path


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesOptions(Options):
    """Options of a command on the user's copies of skills."""

    to: str = "agents"
    """agents (~/.agents/skills), claude (~/.claude/skills), codex, hermes, or a path."""

    project: bool = False
    """Use the folder in the current repository, not the one in the home directory."""

    @property
    def copies(self) -> Copies:
        """The user's copies, in the folder that `--to` and `--project` select."""
        here = Path(local_path("."))
        return target_of(self.to, project=self.project, environment=os.environ, here=here)


@dataclass(frozen=True, slots=True)
class CopyOptions(CopiesOptions):
    """Options of a command on one copy."""

    name: str = field(metadata=POSITIONAL)
    """Name of the skill."""


@dataclass(frozen=True, slots=True)
class SkillsList(CopiesOptions):
    """List the shipped skills, and the state of your copy of each.

    Example: holdfast skills list
    """

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, slots=True)
class SkillsShow(JsonOptions):
    """Print a shipped skill: its entry page, or another of its files.

    Example: holdfast skills show holdfast references/resume.md
    """

    name: str = field(metadata=POSITIONAL)
    """Name of the skill."""

    file: str = field(default=ENTRY, metadata=POSITIONAL)
    """Path below the skill's folder."""


@dataclass(frozen=True, slots=True)
class SkillsSync(CopiesOptions):
    """Bring your copies up to date: copies new skills, and replaces copies that are as they were
    installed. Leaves alone what you changed, deleted or wrote yourself. From the first sync on,
    training and `holdfast serve` sync quietly when they start.

    Example: holdfast skills sync --to claude
    """

    dry_run: bool = False
    """Only print the changes that a sync would make."""

    check: bool = False
    """As --dry-run, and exit with 6 where anything would be done."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, slots=True)
class SkillsUpdate(JsonOptions):
    """Bring your copies up to date in every folder that you have synced by name: agents, claude,
    ...

    Example: holdfast skills update
    """


@dataclass(frozen=True, slots=True)
class SkillsDiff(CopyOptions):
    """Compare your copy with the shipped skill: the changes that a reset would make.

    Example: holdfast skills diff holdfast
    """

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, slots=True)
class SkillsReset(CopyOptions):
    """Replace your copy by the shipped skill. A changed copy is archived first.

    Example: holdfast skills reset holdfast
    """


@dataclass(frozen=True, slots=True)
class SkillsRemove(CopyOptions):
    """Delete your copy. A changed copy is archived first. No sync brings it back; `reset` does.

    Example: holdfast skills remove holdfast
    """


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands of `holdfast skills`. Return the exit status."""
    about, example = "Guides for coding agents.", "holdfast skills sync"
    summaries = {name: summary for name, (summary, _, _) in COMMANDS.items()}
    name = command_in("holdfast skills", summaries, arguments, about, example)
    if name is not None:
        _, kind, action = COMMANDS[name]
        action(parsed(kind, f"skills {name}", arguments[1:]))
    return 0


def _list(options: SkillsList) -> None:
    skills, copies = shipped(), options.copies
    states = sync.survey(skills, copies, installed_version()).skills
    descriptions = {name: skill.description for name, skill in skills.items()}
    if options.json:
        listed = [asdict(one) | {"description": descriptions[one.name]} for one in states]
        say_json({"folder": str(copies.root), "skills": listed})
        return
    rows = [(one.name, one.state, descriptions[one.name].partition(". ")[0]) for one in states]
    say_table(("skill", "your copy", "purpose"), rows)


def _show(options: SkillsShow) -> None:
    skill = shipped_skill(options.name)
    if options.file not in skill.files:
        raise NotFoundError(
            f"skill `{skill.name}` has no file `{options.file}`",
            hint=nearest(options.file, skill.files) or f"files: {', '.join(skill.files)}",
        )
    text = skill.files[options.file].decode()
    if options.json:
        files = [*skill.files]
        say_json({"name": skill.name, "file": options.file, "text": text, "files": files})
    else:
        sys.stdout.write(text)


def _sync(options: SkillsSync) -> None:
    work = sync.survey if options.dry_run or options.check else sync.sync
    result = work(shipped(), options.copies, installed_version())
    _say_synced([result], json=options.json)
    if options.check and result.changes:
        raise MismatchError(f"`{result.root}` is not up to date", hint="holdfast skills sync")


def _update(options: SkillsUpdate) -> None:
    targets = all_targets(os.environ, Path(local_path(".")))
    synced_before = [copies for copies in targets if copies.state.is_dir()]
    if not synced_before:
        raise NotFoundError("no folder of skills was synced yet", hint="holdfast skills sync")
    version = installed_version()
    results = [sync.sync(shipped(), copies, version) for copies in synced_before]
    _say_synced(results, json=options.json)


def _say_synced(results: Sequence[sync.Synced], *, json: bool) -> None:
    if json:
        say_json([asdict(result) for result in results])
    for result in results:
        if not json and not result.busy:
            say(f"{result.root}: {result}")
    if any(result.busy for result in results):
        raise ExistsError("another sync is at work on the same skills", hint="sync again after it")
    problems = [problem for result in results for problem in result.problems]
    if problems:
        raise StorageError("some skills are not up to date:\n  " + "\n  ".join(problems))


def _diff(options: SkillsDiff) -> None:
    skill = shipped_skill(options.name)
    differences = _differences(skill, options.copies)
    if options.json:
        say_json({"name": skill.name, "files": differences})
        return
    sys.stdout.write("".join(differences.values()))


def _differences(skill: Skill, copies: Copies) -> dict[str, str]:
    """Return file -> unified diff from the user's copy to the shipped file."""
    digests, folder = copies.digests(skill.name), copies.folder(skill.name)
    if digests is None:
        raise NotFoundError(f"there is no `{folder}`", hint=f"holdfast skills reset {skill.name}")
    differences = {}
    for file in sorted(skill.files):
        if digests.get(file) == skill.digests[file]:
            continue
        try:
            copied = (folder / file).read_text(errors="replace").splitlines(keepends=True)
        except OSError:
            copied = []
        original = skill.files[file].decode(errors="replace").splitlines(keepends=True)
        lines = difflib.unified_diff(copied, original, f"yours/{file}", f"shipped/{file}")
        differences[file] = "".join(lines)
    return differences


def _reset(options: SkillsReset) -> None:
    skill, copies = shipped_skill(options.name), options.copies
    archive = sync.reset(skill, copies, installed_version())
    say(f"{copies.folder(skill.name)} is as shipped" + (f"; yours: {archive}" if archive else ""))


def _remove(options: SkillsRemove) -> None:
    skill, copies = shipped_skill(options.name), options.copies
    archive = sync.remove(skill, copies, installed_version())
    kept = f"; yours: {archive}" if archive else ""
    say(f"{copies.folder(skill.name)} is gone for good{kept}")


COMMANDS: dict[str, tuple[str, type[Any], Callable[[Any], None]]] = {
    "list": ("list the shipped skills, and the state of your copies", SkillsList, _list),
    "show": ("print a shipped skill", SkillsShow, _show),
    "sync": ("copy new skills, replace outdated copies", SkillsSync, _sync),
    "update": ("sync every folder that you have synced before", SkillsUpdate, _update),
    "diff": ("compare your copy with the shipped skill", SkillsDiff, _diff),
    "reset": ("replace your copy by the shipped skill", SkillsReset, _reset),
    "remove": ("delete your copy for good", SkillsRemove, _remove),
}
"""Summary, options and function of each command."""
