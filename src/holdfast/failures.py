"""Turn unexpected exceptions into errors that say whose code failed, and where."""

from __future__ import annotations

import logging
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from types import CodeType
from typing import TypeVar

from holdfast.errors import HoldfastError, StorageError, UsageError

T = TypeVar("T")

logger: logging.Logger = logging.getLogger("holdfast")

TEXT_MAX = 2000
"""Longest message that is quoted, in characters. Those of torch can list thousands of keys."""

_OURS = __file__.removesuffix("failures.py")
"""Folder of this package: the prefix of the file names of its code objects."""

_LIBRARIES = tuple(
    os.path.join(sysconfig.get_path(name), "")  # noqa: PTH118 - ends in a separator
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)

_METHODS = ("state_dict", "load_state_dict")
"""Methods of user objects that Holdfast calls."""

_CALLERS = ("numbers_in",)
"""Names of the functions of Holdfast that call a user's function."""

_MISCALLED = re.compile(r"([\w.<>]+)\(\) (?:missing|takes|got) ")
"""Start of Python's message about a call with wrong arguments."""


def worded(error: Exception) -> HoldfastError:
    """Describe an unexpected exception, from user code or from a bug, as a `HoldfastError`.

    Its `__cause__` is `error`. Causes do not reach other ranks, so this rank also logs the full
    stack at DEBUG level.
    """
    described = _worded(error)
    described.__cause__ = error
    logger.debug("%s", described.what, exc_info=error)
    return described


def tried(work: Callable[[], T]) -> T | HoldfastError:
    """Return the result of `work`, or its error. An interrupt is raised."""
    try:
        return work()
    except HoldfastError as error:
        return error
    except Exception as error:  # noqa: BLE001 - the caller decides what to do with it
        return worded(error)


def _worded(error: Exception) -> HoldfastError:
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    raiser = _raiser(frames)
    # State methods and `metrics` functions are known user code. An OSError from other user code
    # comes from a custom store, and is reported as a storage error below.
    if raiser is not None and (not isinstance(error, OSError) or _calls_user_code(frames)):
        code, line = raiser
        return UsageError(
            f"`{code.co_qualname}` raised {_spelled(error)} ({_location(code, line)})",
            hint="Holdfast called this function: fix it, or the state that it was given. The stack "
            "is the `__cause__` of this error, and in the log at DEBUG level",
        )
    miscalled = _MISCALLED.match(str(error)) if isinstance(error, TypeError) else None
    if miscalled and frames and _is_ours(frames[-1][0]):
        return UsageError(
            f"`{miscalled[1]}` does not take the arguments that Holdfast passes: {error}",
            hint="Holdfast calls `state_dict()` and a `metrics` function without arguments, "
            "`load_state_dict(state)` with one",
        )
    if isinstance(error, OSError):
        return StorageError(f"{error}")
    ours = [(code, line) for code, line in frames if _is_ours(code)]
    where = f" ({_location(*ours[-1])}, in `{ours[-1][0].co_qualname}`)" if ours else ""
    hint = "report it with the stack: the `__cause__` of this error, and in the log at DEBUG level"
    if isinstance(error, RecursionError):
        hint = "check that the state does not contain itself, or hundreds of nested levels"
    return HoldfastError(f"Holdfast failed with {_spelled(error)}{where}", hint=hint)


def _raiser(frames: Sequence[tuple[CodeType, int]]) -> tuple[CodeType, int] | None:
    """Find the user code that raised, and return its code and line; None if Holdfast itself failed.
    `frames`: code and line of each frame of the traceback.

    User code is the innermost function outside of Holdfast and of installed packages. If there is
    none, it is the method in `_METHODS` that Holdfast called on an object of an installed package.
    """
    users = [(code, line) for code, line in frames if not (_is_library(code) or _is_ours(code))]
    if users:
        return users[-1]
    raiser, is_called = None, False
    for code, line in frames:
        if _is_ours(code):
            is_called = True
        elif is_called and code.co_name in _METHODS:
            # Holdfast may have called a wrapper of this method: torch wraps `state_dict`.
            raiser, is_called = (code, line), False
    return raiser


def _calls_user_code(frames: Sequence[tuple[CodeType, int]]) -> bool:
    """Whether Holdfast called a state method or a `metrics` function of the user."""
    return any(
        callee.co_name in _METHODS or caller.co_name in _CALLERS
        for (caller, _), (callee, _) in pairwise(frames)
        if _is_ours(caller) and not _is_ours(callee)
    )


def _spelled(error: Exception) -> str:
    text = str(error).strip()
    if len(text) > TEXT_MAX:
        text = f"{text[:TEXT_MAX]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _location(code: CodeType, line: int) -> str:
    """Format file and line, with the file relative to the current directory."""
    file = code.co_filename
    with suppress(FileNotFoundError):  # The current directory may have been deleted.
        file = file.removeprefix(os.path.join(os.getcwd(), ""))  # noqa: PTH109, PTH118
    return f"{file}, line {line}"


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_OURS)


def _is_library(code: CodeType) -> bool:
    """Whether the code belongs to Python or to an installed package."""
    file = code.co_filename
    installed = "site-packages" in file or "dist-packages" in file
    return file.startswith(("<frozen ", *_LIBRARIES)) or installed
