"""Folders in which agents find skills: in the home directory, and in the current repository."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from holdfast.errors import NotFoundError, UsageError
from holdfast.skills.copies import Copies

HOMES = {
    "agents": (".agents", ""),
    "claude": (".claude", "CLAUDE_CONFIG_DIR"),
    "codex": (".codex", "CODEX_HOME"),
    "hermes": (".hermes", "HERMES_HOME"),
}
"""Name for `--to` -> folder in the home directory, and the environment variable with another."""

OF_PROJECTS = ("agents", "claude", "codex")
"""Names in `HOMES` of agents that also read a folder in the current repository."""


def target_of(to: str, *, project: bool, environment: Mapping[str, str], here: Path) -> Copies:
    """Returns the copies in the folder that `--to` names: one of `HOMES`, or a path.

    Raises:
        UsageError: `project` with a path, or with an agent that has no folder in projects.
        NotFoundError: `project`, and `here` is in no repository.
    """
    if not project and to not in HOMES:
        return Copies(here / Path(to).expanduser())
    if not project:
        folder, variable = HOMES[to]
        home = Path(environment.get(variable) or Path(environment.get("HOME") or "~", folder))
        return Copies(home / "skills", categories=to == "hermes")
    if to not in OF_PROJECTS:
        raise UsageError(
            f"`--project` goes with {', '.join(OF_PROJECTS)}, not with `{to}`",
            hint="give the path alone" if to not in HOMES else None,
        )
    repository = _repository(here)
    if repository is None:
        raise NotFoundError(f"`{here}` is in no repository", hint="`--project` needs one: git init")
    return Copies(repository / HOMES[to][0] / "skills")


def all_targets(environment: Mapping[str, str], here: Path) -> Iterator[Copies]:
    """Yields the copies in every folder that has a name for `--to`, whether or not it exists."""
    for name in HOMES:
        yield target_of(name, project=False, environment=environment, here=here)
    if _repository(here) is not None:
        for name in OF_PROJECTS:
            yield target_of(name, project=True, environment=environment, here=here)


def _repository(here: Path) -> Path | None:
    return next((above for above in (here, *here.parents) if (above / ".git").exists()), None)
