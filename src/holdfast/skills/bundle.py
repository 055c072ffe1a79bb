"""The skills that this version ships."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import FormatError
from holdfast.skills.content import Digests, digest

ENTRY = "SKILL.md"
"""File that an agent reads first."""

NAME_LENGTH_MAX = 64
DESCRIPTION_LENGTH_MAX = 1024

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Skill:
    """One skill: its files, by their path below its folder."""

    name: str
    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > NAME_LENGTH_MAX:
            raise FormatError(
                f"a skill's name must be up to {NAME_LENGTH_MAX} lower-case letters, digits and "
                f"single hyphens, found: {self.name!r}"
            )
        for file in self.files:
            if file.startswith("/") or {"", ".", ".."} & {*file.split("/")}:
                raise FormatError(f"skill `{self.name}` has a file outside of its folder: {file!r}")

    @property
    def digests(self) -> Digests:
        return {file: digest(data) for file, data in self.files.items()}

    @property
    def description(self) -> str:
        """Purpose of the skill, and when an agent should read it."""
        return frontmatter(self.files[ENTRY].decode())["description"]


def shipped() -> dict[str, Skill]:
    """Read the skills of this version; returns them by name."""
    skills = {}
    for folder in sorted((Path(__file__).parent.parent / ".agents" / "skills").iterdir()):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        if files:
            skills[folder.name] = Skill(folder.name, files)
    return skills


def frontmatter(text: str) -> dict[str, str]:
    """Read the fields at the top of a `SKILL.md`, one per line.

    >>> frontmatter("---\\nname: a\\ndescription: b\\n---\\nText.")
    {'name': 'a', 'description': 'b'}

    Raises:
        FormatError: no such fields.
    """
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not match:
        raise FormatError(f"`{ENTRY}` does not begin with fields between two lines of `---`")
    lines = (line.partition(":") for line in match[1].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
