"""Where agents look for skills: for a user, and for the repository at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import NotFoundError, UsageError

HOMES = {
    "agents": (".agents", ""),
    "claude": (".claude", "CLAUDE_CONFIG_DIR"),
    "codex": (".codex", "CODEX_HOME"),
    "hermes": (".hermes", "HERMES_HOME"),
}
"""Folder in the home directory that has a folder `skills`, and the variable that moves it."""

OF_PROJECTS = ("agents", "claude", "codex")


@dataclass(frozen=True, slots=True)
class SkillTarget:
    """A folder of skills."""

    root: Path
    categories: bool = False
    """Whether skills may also lie one folder deeper."""


def target_of(to: str, *, project: bool, environment: Mapping[str, str], here: Path) -> SkillTarget:
    """The folder that `--to` means: a name in `HOMES`, or a path.

    Raises:
        UsageError: an agent that has no folder in a project, or a path and a project.
        NotFoundError: `here` is in no repository.
    """
    if not project:
        if to not in HOMES:
            return SkillTarget(here / Path(to).expanduser())
        return SkillTarget(_home(to, environment), categories=to == "hermes")
    if to not in OF_PROJECTS:
        raise UsageError(
            f"`--project` goes with {', '.join(OF_PROJECTS)}, not with `{to}`",
            hint="give the path alone" if to not in HOMES else None,
        )
    repository = _repository(here)
    if repository is None:
        raise NotFoundError(f"`{here}` is in no repository", hint="`--project` needs one: git init")
    return SkillTarget(repository / HOMES[to][0] / "skills")


def all_targets(environment: Mapping[str, str], here: Path) -> Iterator[SkillTarget]:
    """Every folder that goes by a name, there or not."""
    for name in HOMES:
        yield target_of(name, project=False, environment=environment, here=here)
    repository = _repository(here)
    for name in OF_PROJECTS if repository else ():
        yield target_of(name, project=True, environment=environment, here=here)


def _home(name: str, environment: Mapping[str, str]) -> Path:
    folder, variable = HOMES[name]
    moved = environment.get(variable) if variable else None
    return (Path(moved) if moved else Path(environment.get("HOME") or "~", folder)) / "skills"


def _repository(here: Path) -> Path | None:
    return next((above for above in (here, *here.parents) if (above / ".git").exists()), None)
