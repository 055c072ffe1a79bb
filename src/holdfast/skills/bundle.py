"""The skills that this version of Holdfast ships."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import FormatError, NotFoundError
from holdfast.skills.records import Digests, digest

ENTRY = "SKILL.md"
"""File that an agent reads first."""


@dataclass(frozen=True, slots=True)
class Skill:
    """One shipped skill."""

    name: str
    files: Mapping[str, bytes]
    """Content of each file, by its path in the skill's folder."""

    @property
    def digests(self) -> Digests:
        """SHA-256 of each file, by its path in the skill's folder."""
        return {file: digest(data) for file, data in self.files.items()}

    @property
    def description(self) -> str:
        """Purpose of the skill, and when an agent should read it."""
        return frontmatter(self.files[ENTRY].decode())["description"]


def shipped() -> dict[str, Skill]:
    """Read all shipped skills. Return them by name."""
    skills = {}
    for folder in sorted((Path(__file__).parent.parent / ".agents" / "skills").iterdir()):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        if files:
            skills[folder.name] = Skill(folder.name, files)
    return skills


def shipped_skill(name: str) -> Skill:
    """Read one shipped skill."""
    skills = shipped()
    if name not in skills:
        raise NotFoundError(f"no skill is named `{name}`", hint=f"shipped: {', '.join(skills)}")
    return skills[name]


def frontmatter(text: str) -> dict[str, str]:
    """Read the fields at the top of a `SKILL.md`, one per line.

    >>> frontmatter("---\\nname: a\\ndescription: b\\n---\\nText.")
    {'name': 'a', 'description': 'b'}
    """
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not match:
        raise FormatError(f"`{ENTRY}` does not begin with fields between two lines of `---`")
    lines = (line.partition(":") for line in match[1].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
