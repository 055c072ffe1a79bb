"""Folders in which agents look for skills: a user's, and those of the current repository."""

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
"""Name for `--to` -> folder in the home directory, and the variable that replaces it."""

OF_PROJECTS = ("agents", "claude", "codex")


@dataclass(frozen=True, slots=True)
class SkillTarget:
    """A folder of skills."""

    root: Path
    categories: bool = False
    """Whether skills may also lie one folder deeper."""


def target_of(to: str, *, project: bool, environment: Mapping[str, str], here: Path) -> SkillTarget:
    """Returns the folder that `--to` names: one of `HOMES`, or a path.

    Raises:
        UsageError: `project` with a path, or with an agent that has no folder in projects.
        NotFoundError: `project`, and `here` is in no repository.
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
    """Yields every folder that has a name for `--to`, whether or not it exists."""
    for name in HOMES:
        yield target_of(name, project=False, environment=environment, here=here)
    if _repository(here) is not None:
        for name in OF_PROJECTS:
            yield target_of(name, project=True, environment=environment, here=here)


def _home(name: str, environment: Mapping[str, str]) -> Path:
    folder, variable = HOMES[name]
    replaced = environment.get(variable) if variable else None
    home = Path(environment.get("HOME") or "~", folder)
    return (Path(replaced) if replaced else home) / "skills"


def _repository(here: Path) -> Path | None:
    return next((above for above in (here, *here.parents) if (above / ".git").exists()), None)
