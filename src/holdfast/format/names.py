"""Names inside a checkpoint folder: an anchored grammar, so that a stranger's name is never taken.

step-500                  a published step
.attempt-NAME-1f2e3d4c    a save at work, or what a killed one left: no reader looks at it
.replaced-NAME-1f2e3d4c   the earlier NAME while a new one takes its place
.removing-NAME-1f2e3d4c   a checkpoint half deleted
.pinned-step-500          a mark: retention never removes step 500
.damaged-step-500         a mark: data of step 500 was found damaged
.held-NAME-1f2e3d4c       locked in place of the folder NAME, where folders cannot be locked
.lock                     who is saving here
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from holdfast.arguments import shown, whole_number
from holdfast.errors import UsageError

METADATA = ".metadata"
MANIFEST = "manifest.json"
LOCK = ".lock"

STEP_MAX = 10**18 - 1
"""Largest step: the name of a larger one would be longer than the grammar allows, so that no
reader would find it."""
_HELD = ".held-"

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})", re.ASCII)
_ASIDE = re.compile(r"\.(attempt|replaced|removing)-([^/]+)-([0-9a-f]{8})", re.ASCII)
_MARK = re.compile(r"\.(pinned|damaged)-(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Aside:
    """A folder that is not a checkpoint yet, or no longer."""

    role: Literal["attempt", "replaced", "removing"]
    name: str
    """The checkpoint that it is to become, or was."""

    id: str
    """Eight hexadecimal digits that tell two of them apart."""

    def __str__(self) -> str:
        return f".{self.role}-{self.name}-{self.id}"


@dataclass(frozen=True, slots=True)
class Mark:
    """What is known of a step and stands beside it: nothing is written into a published one."""

    role: Literal["pinned", "damaged"]
    step: int

    def __str__(self) -> str:
        return f".{self.role}-{step_name(self.step)}"


def checked_step(value: object, what: str, *, least: int = 0) -> int:
    """The step number that was passed as `what`: any integer of Python, numpy or torch.

    Raises:
        UsageError: no whole number, below `least`, or above `STEP_MAX`.
    """
    step = whole_number(value)
    if step is None or not least <= step <= STEP_MAX:
        found = shown(value if step is None else step)
        raise UsageError(
            f"`{what}` must be a whole number from {least} to {STEP_MAX}, found: {found}",
            hint="`int(...)` makes it one" if isinstance(value, float | str) else None,
        )
    return step


def step_name(step: int) -> str:
    """Folder of a step.

    >>> step_name(500)
    'step-500'
    """
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds; None where the name is somebody else's.

    >>> step_of("step-500"), step_of("best-step-20"), step_of("step-030"), step_of("step-30.bak")
    (500, None, None, None)
    """
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_among(names: Iterable[str]) -> dict[int, str]:
    """The steps in a folder, oldest first, each with the folder that holds it, from the names that
    are there (of folders ending in `/`). That is the folder of its name; or, where a save that was
    to take its place has died between its two renames, the one that was set aside.

    >>> steps_among(["step-20/", "step-9/", ".replaced-step-30-1f2e3d4c/", "step-4"])
    {9: 'step-9', 20: 'step-20', 30: '.replaced-step-30-1f2e3d4c'}
    """
    found = {}
    for folder in (name.rstrip("/") for name in sorted(names) if name.endswith("/")):
        step = step_standing_in(folder)
        if step is not None:
            # In the order of the alphabet, what was set aside stands before what has the name.
            found[step] = folder
    return dict(sorted(found.items()))


def step_standing_in(folder: str) -> int | None:
    """The step that a folder stands for: by its name, or set aside while its successor was saved.

    >>> step_standing_in("step-30"), step_standing_in(".replaced-step-30-1f2e3d4c")
    (30, 30)
    """
    aside = aside_of(folder)
    return step_of(aside.name if aside and aside.role == "replaced" else folder)


def standing_among(names: Iterable[str], name: str) -> str | None:
    """The folder that stands for checkpoint `name`, from the names that are there: its own; or the
    one set aside by a save that has died between its two renames. None where there is neither.

    >>> standing_among([".replaced-best-1f2e3d4c/"], "best"), standing_among(["best/"], "best")
    ('.replaced-best-1f2e3d4c', 'best')
    """
    found = None
    for one in (other.rstrip("/") for other in names):
        if one == name:
            return name
        aside = aside_of(one)
        if found is None and aside is not None and (aside.role, aside.name) == ("replaced", name):
            found = one
    return found


def aside_of(name: str) -> Aside | None:
    """What a folder set aside under this name is; None where the name is somebody else's."""
    match = _ASIDE.fullmatch(name)
    if not match:
        return None
    role: Literal["attempt", "replaced", "removing"] = match[1]  # type: ignore[assignment]
    return Aside(role, match[2], match[3])


def mark_of(name: str) -> Mark | None:
    """The mark that a file of this name is; None where the name is somebody else's."""
    match = _MARK.fullmatch(name)
    step = step_of(match[2]) if match else None
    if match is None or step is None:
        return None
    role: Literal["pinned", "damaged"] = match[1]  # type: ignore[assignment]
    return Mark(role, step)


def held_file(name: str) -> str:
    """File that is locked in place of a folder of this name, beside it. A checkpoint has one file
    by whatever name it is set aside, since who holds it may rename it; an attempt has its own.

    >>> held_file("step-5"), held_file(".replaced-step-5-1f2e3d4c")
    ('.held-step-5-1eb6696e', '.held-step-5-1eb6696e')
    """
    aside = aside_of(name)
    held = name if aside is None or aside.role == "attempt" else aside.name
    return f"{_HELD}{held}-{crc32(os.fsencode(held)):08x}"


def held_of(name: str) -> str | None:
    """Folder in whose place a file of this name is locked; None where it is no such file."""
    folder = name.removeprefix(_HELD)[:-9]
    return folder if name == held_file(folder) else None


def _is_taken(name: str) -> bool:
    """Whether Holdfast gives this name to files or folders of its own."""
    own = name in (LOCK, MANIFEST, METADATA) or name.startswith(_HELD)
    return own or aside_of(name) is not None or mark_of(name) is not None


NAME_BYTES_MAX = 255 - len(held_file(str(Aside("attempt", "", "0" * 8))))
"""Longest name of a checkpoint. File systems allow 255 bytes, and the names that Holdfast makes of
it while it is saved, replaced and deleted are longer."""


def check_name(name: str, where: str) -> None:
    """Make sure that a checkpoint at the path `where` may have this name.

    Raises:
        UsageError: a name that Holdfast itself uses, and would clean up; or one that is too long.
    """
    if _is_taken(name):
        raise UsageError(
            f"`{where}` is no place for a checkpoint: Holdfast itself uses names such as `{name}`",
            hint="choose another name, without a dot at its start",
        )
    nbytes = len(os.fsencode(name))
    if nbytes > NAME_BYTES_MAX:
        raise UsageError(
            f"the name of `{where}` has {nbytes} bytes, a checkpoint may have {NAME_BYTES_MAX}: "
            "while it is saved or replaced it has a longer one",
            hint="choose a shorter name",
        )


def data_file(rank: int) -> str:
    """File of one rank's items, as stock DCP names it."""
    return f"__{rank}_0.distcp"
