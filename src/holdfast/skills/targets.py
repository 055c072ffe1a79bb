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
"""Folder in the home directory, and environment variable that overrides it, by name for `--to`."""

OF_PROJECTS = ("agents", "claude", "codex")
"""Names in `HOMES` of agents that read a folder in the current repository too."""


def target_of(to: str, *, project: bool, environment: Mapping[str, str], here: Path) -> Copies:
    """Return the copies in the folder that `--to` names: one of `HOMES`, or a path.

    `project`: take the folder in the repository around `here`, the current folder.

    Raises:
        UsageError: `project` is set, and `to` is a path, or an agent without folders in projects.
        NotFoundError: `project` is set, and `here` is not in a repository.
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
    """Yield the copies in every folder that `--to` can name, even if the folder does not exist."""
    for name in HOMES:
        yield target_of(name, project=False, environment=environment, here=here)
    if _repository(here) is not None:
        for name in OF_PROJECTS:
            yield target_of(name, project=True, environment=environment, here=here)


def _repository(here: Path) -> Path | None:
    return next((above for above in (here, *here.parents) if (above / ".git").exists()), None)
