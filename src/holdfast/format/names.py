"""Names of files and folders beside and inside checkpoints.

step-500                  a published checkpoint
.attempt-NAME-1f2e3d4c    a save in progress, or left by a killed save; readers ignore it
.replaced-NAME-1f2e3d4c   the earlier NAME, while a new checkpoint takes its place
.removing-NAME-1f2e3d4c   a checkpoint that is being deleted
.pinned-step-500          a mark: retention never deletes step-500
.damaged-step-500         a mark: step-500 was found damaged
.held-NAME-1f2e3d4c       file locked instead of folder NAME, where folders cannot be locked
.lock                     lock of the run that saves here
.tier.json                where the run's checkpoints are on the hosts
.lock.taking              a lock that is being taken, where there is no flock

A name must match its whole pattern. Similar names belong to the user, and are never touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, cast
from zlib import crc32

from holdfast.arguments import shown, whole_number
from holdfast.errors import UsageError

METADATA = ".metadata"
MANIFEST = "manifest.json"
ROWS = "index.bin"
INDEX_FILES = (METADATA, ROWS, MANIFEST)
"""Files that list the entries of a checkpoint, in the order in which they are written. Small
checkpoints have no `index.bin`."""

LOCK = ".lock"
TIER = ".tier.json"

TAKING = ".taking"
"""Suffix of the file that a process creates to take a lease, where there is no flock."""

STEP_MAX = 10**18 - 1
"""Largest step number. Readers would not find a larger one: the pattern allows 18 digits."""

_HELD = ".held-"

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})", re.ASCII)
_HIDDEN = re.compile(r"\.(attempt|replaced|removing)-([^/]+)-([0-9a-f]{8})", re.ASCII)
_NUMBER = re.compile(r"[0-9]+(?!.*[0-9])", re.ASCII)
_MARK = re.compile(r"\.(pinned|damaged)-(.+)", re.ASCII)
_DATA_FILE = re.compile(r"__(0|[1-9][0-9]{0,8})_(0|[1-9][0-9]{0,8})\.distcp", re.ASCII)


HiddenRole = Literal["attempt", "replaced", "removing"]
MarkRole = Literal["pinned", "damaged"]


@dataclass(frozen=True, slots=True)
class HiddenFolder:
    """A folder that is not yet a checkpoint, or no longer one."""

    role: HiddenRole
    name: str
    """Name of the checkpoint that the folder will become, or was."""

    id: str
    """Eight random hexadecimal digits."""

    def __str__(self) -> str:
        return f".{self.role}-{self.name}-{self.id}"


@dataclass(frozen=True, slots=True)
class Mark:
    """A file that marks the checkpoint beside it. It is not in the checkpoint's folder, since a
    published folder never changes."""

    role: MarkRole
    step: int

    def __str__(self) -> str:
        return f".{self.role}-{step_name(self.step)}"


def checked_step(value: object, what: str, *, least: int = 0) -> int:
    """Convert a number of Python, numpy or torch to a step number. `what`: name of the argument.

    Raises:
        UsageError: the value is not a whole number, is below `least` or above `STEP_MAX`.
    """
    step = whole_number(value)
    if step is None or not least <= step <= STEP_MAX:
        text = shown(value if step is None else step)
        raise UsageError(
            f"`{what}` must be a whole number from {least} to {STEP_MAX}, found: {text}",
            hint="convert it with `int(...)`" if isinstance(value, float | str) else None,
        )
    return step


def step_name(step: int) -> str:
    """Return the folder name of a step.

    >>> step_name(500)
    'step-500'
    """
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """Return the step number in a folder name; None if the name is not `step-N`.

    >>> step_of("step-500"), step_of("best-step-20"), step_of("step-030"), step_of("step-30.bak")
    (500, None, None, None)
    """
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_among(names: Iterable[str]) -> dict[int, str]:
    """Return the folder of each step, oldest first, given the names in the folder of a run.

    In `names`, a folder ends in `/`. The folder of step N is called `step-N`, or
    `.replaced-step-N-ID` if a save that was replacing the checkpoint died between its two renames.

    >>> steps_among(["step-20/", "step-9/", ".replaced-step-30-1f2e3d4c/", "step-4"])
    {9: 'step-9', 20: 'step-20', 30: '.replaced-step-30-1f2e3d4c'}
    """
    folders = [name.rstrip("/") for name in sorted(names) if name.endswith("/")]
    # `.replaced-step-N` sorts before `step-N`. So if both exist, `step-N` overwrites it here.
    found = {step: f for f in folders if (step := step_of_folder(f)) is not None}
    return dict(sorted(found.items()))


def number_of(name: str) -> int | None:
    """Return the last number in the name of a sealed folder, such as the step in `checkpoint-500`.

    >>> number_of("checkpoint-500"), number_of("epoch=3-step=1200"), number_of("best")
    (500, 1200, None)
    """
    found = _NUMBER.search(name)
    return None if found is None else int(found[0])


def visible_name(folder: str) -> str | None:
    """Return the name that readers use for a folder; None if they ignore the folder.

    A save that was killed may have renamed the checkpoint NAME to `.replaced-NAME-ID`. Readers
    still use NAME.

    >>> visible_name("best"), visible_name(".replaced-best-1f2e3d4c")
    ('best', 'best')
    >>> visible_name(".attempt-best-1f2e3d4c")
    """
    hidden = hidden_folder_of(folder)
    if hidden is None:
        return folder
    return hidden.name if hidden.role == "replaced" else None


def step_of_folder(folder: str) -> int | None:
    """Return the step in the name of a checkpoint's folder, which may begin with `.replaced-`;
    None for other names.

    >>> step_of_folder("step-30"), step_of_folder(".replaced-step-30-1f2e3d4c")
    (30, 30)
    """
    return step_of(visible_name(folder) or "")


def number_of_folder(folder: str) -> int | None:
    """Return the last number in the name of a sealed folder, which may begin with `.replaced-`;
    None if there is no number.

    >>> number_of_folder("epoch-3"), number_of_folder(".replaced-epoch-3-1f2e3d4c")
    (3, 3)
    """
    return number_of(visible_name(folder) or "")


def folder_among(names: Collection[str], name: str) -> str | None:
    """Return the folder of checkpoint `name`; None if it is not among `names`.

    The folder is called `name`, or `.replaced-NAME-ID` if a save that was replacing the checkpoint
    died between its two renames.

    >>> folder_among([".replaced-best-1f2e3d4c/"], "best"), folder_among(["best/"], "best")
    ('.replaced-best-1f2e3d4c', 'best')
    """
    if name in names or f"{name}/" in names:
        return name
    hidden = filter(None, (hidden_folder_of(other.rstrip("/")) for other in names))
    return next((str(h) for h in hidden if (h.role, h.name) == ("replaced", name)), None)


def hidden_folder_of(name: str) -> HiddenFolder | None:
    """Parse the name of a `HiddenFolder`; None for other names."""
    match = _HIDDEN.fullmatch(name)
    return HiddenFolder(cast("HiddenRole", match[1]), match[2], match[3]) if match else None


def mark_of(name: str) -> Mark | None:
    """Parse the name of a `Mark`; None for other names."""
    match = _MARK.fullmatch(name)
    step = step_of(match[2]) if match else None
    return None if match is None or step is None else Mark(cast("MarkRole", match[1]), step)


def held_file(name: str) -> str:
    """Return the name of the file that is locked in place of the folder `name`. The file is beside
    the folder.

    A checkpoint has the same file under its `.replaced` and `.removing` names, since a process that
    has locked the checkpoint may rename it. An attempt has a file of its own.

    >>> held_file("step-5"), held_file(".replaced-step-5-1f2e3d4c")
    ('.held-step-5-1eb6696e', '.held-step-5-1eb6696e')
    """
    hidden = hidden_folder_of(name)
    folder = name if hidden is None or hidden.role == "attempt" else hidden.name
    return f"{_HELD}{folder}-{crc32(os.fsencode(folder)):08x}"


def held_of(name: str) -> str | None:
    """Return the folder for which `held_file` returns the name `name`; None if there is none. A
    `.replaced` or `.removing` folder counts as the checkpoint that it was."""
    folder = name.removeprefix(_HELD)[:-9]
    return folder if name == held_file(folder) else None


def _is_taken(name: str) -> bool:
    """Return whether Holdfast uses this name for its own files or folders."""
    own = name in (LOCK, LOCK + TAKING, TIER, MANIFEST, METADATA) or name.startswith(_HELD)
    return own or hidden_folder_of(name) is not None or mark_of(name) is not None


NAME_BYTES_MAX = 255 - len(held_file(str(HiddenFolder("attempt", "", "0" * 8))))
"""Maximum length of a checkpoint's name. File systems allow 255 bytes, and while a checkpoint is
saved, replaced or deleted, Holdfast uses longer names that contain its name."""


def check_name(name: str, where: str) -> None:
    """Make sure that a checkpoint at the path `where` may have this name.

    Raises:
        UsageError: the name is too long, or Holdfast itself uses it and would clean it up.
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


def data_file(rank: int, number: int = 0) -> str:
    """Return the name of a rank's data file, as in stock DCP. A rank that shares files with earlier
    checkpoints has several data files with different numbers."""
    return f"__{rank}_{number}.distcp"


def rank_and_number(file: str) -> tuple[int, int] | None:
    """Return the rank and the number in the name of a data file; None for other names.

    >>> rank_and_number("__3_1.distcp"), rank_and_number("__03_1.distcp")
    ((3, 1), None)
    """
    match = _DATA_FILE.fullmatch(file)
    return (int(match[1]), int(match[2])) if match else None
