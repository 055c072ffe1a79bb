"""Errors that nobody raised on purpose, in words: whose code raised what, and where."""

from __future__ import annotations

import logging
import os
import re
import sysconfig
import traceback
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from types import CodeType

from holdfast.errors import HoldfastError, StorageError, UsageError

logger: logging.Logger = logging.getLogger("holdfast")

TEXT_MAX = 2000
"""Characters of an error's own message that are repeated: torch lists every missing key."""

_OURS = __file__.removesuffix("failures.py")
"""Folder of this package, as code objects have it."""

_LIBRARIES = tuple(
    os.path.join(sysconfig.get_path(name), "")  # noqa: PTH118 - ends in a separator
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


_METHODS = ("state_dict", "load_state_dict")
"""What objects that hold state are asked for."""

_CALLERS = ("numbers_in",)
"""Functions of ours that call a function of the user's."""

_MISCALLED = re.compile(r"([\w.<>]+)\(\) (?:missing|takes|got) ")
"""How Python's message on a call with the wrong arguments begins."""


def worded(error: Exception) -> HoldfastError:
    """What is told to people and to other ranks of an error from somebody else's code, or from a
    fault of ours. Its `__cause__` is `error`; causes do not cross ranks, so that the log of this
    rank has the whole stack too, at DEBUG level."""
    found = _worded(error)
    found.__cause__ = error
    logger.debug("%s", found.what, exc_info=error)
    return found


def _worded(error: Exception) -> HoldfastError:
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    raiser = _raiser(frames)
    # A store may be somebody else's code too, and what it raises is trouble with the store.
    if raiser is not None and (not isinstance(error, OSError) or _asks_for_state(frames)):
        code, line = raiser
        return UsageError(
            f"`{code.co_qualname}` raised {_spelled(error)} ({_place(code, line)})",
            hint="Holdfast called this: the fault is in it, or in the state that it was given. The "
            "stack is the `__cause__` of this error, and in the log at DEBUG level",
        )
    miscalled = _MISCALLED.match(str(error)) if isinstance(error, TypeError) else None
    if miscalled and frames and _is_ours(frames[-1][0]):
        return UsageError(
            f"`{miscalled[1]}` does not take the arguments that Holdfast calls it with: {error}",
            hint="`state_dict()` and a function for `metrics` are called without arguments, "
            "`load_state_dict(state)` with one",
        )
    if isinstance(error, OSError):
        return StorageError(f"{error}")
    ours = [(code, line) for code, line in frames if _is_ours(code)]
    where = f" ({_place(*ours[-1])}, in `{ours[-1][0].co_qualname}`)" if ours else ""
    hint = "report it with the stack: the `__cause__` of this error, and in the log at DEBUG level"
    if isinstance(error, RecursionError):
        hint = "does the state hold itself, or is it nested hundreds of levels deep?"
    return HoldfastError(f"Holdfast failed with {_spelled(error)}{where}", hint=hint)


def _raiser(frames: Sequence[tuple[CodeType, int]]) -> tuple[CodeType, int] | None:
    """Where code that was handed to Holdfast raised: the innermost function that is neither ours
    nor installed; else the method of an installed object that we asked for its state. None where
    it was no such code."""
    theirs = [one for one in frames if not _is_library(one[0]) and not _is_ours(one[0])]
    if theirs:
        return theirs[-1]
    found, is_called = None, False
    for code, line in frames:
        if _is_ours(code):
            is_called = True
        elif is_called and code.co_name in _METHODS:
            # Not always the function that we call: torch wraps `state_dict` in another one.
            found, is_called = (code, line), False
    return found


def _asks_for_state(frames: Sequence[tuple[CodeType, int]]) -> bool:
    """Whether an object was asked for its state, or a function for what a step has measured."""
    return any(
        after.co_name in _METHODS or before.co_name in _CALLERS
        for (before, _), (after, _) in pairwise(frames)
        if _is_ours(before) and not _is_ours(after)
    )


def _spelled(error: Exception) -> str:
    text = str(error).strip()
    if len(text) > TEXT_MAX:
        text = f"{text[:TEXT_MAX]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(code: CodeType, line: int) -> str:
    """File and line; the file as the user would name it from the current directory."""
    file = code.co_filename
    with suppress(FileNotFoundError):  # The current directory may have been deleted.
        file = file.removeprefix(os.path.join(os.getcwd(), ""))  # noqa: PTH109, PTH118
    return f"{file}, line {line}"


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_OURS)


def _is_library(code: CodeType) -> bool:
    """Whether this is code of Python or of an installed package."""
    file = code.co_filename
    installed = "site-packages" in file or "dist-packages" in file
    return file.startswith(("<frozen ", *_LIBRARIES)) or installed
