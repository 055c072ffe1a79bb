"""Functions that `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import CodeType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Keep `torch.compile` from compiling `function` and everything that it calls.

    Does the same as `torch.compiler.disable`, but does not import the compiler. The import takes
    seconds, and most processes that save compile nothing.
    """
    made: Any = function
    made._torchdynamo_disable = True
    made._torchdynamo_disable_msg = "Holdfast reads and writes files"
    _leave_alone(made.__code__)
    return function


def _leave_alone(code: CodeType) -> None:
    """Let the compiler skip frames of this code, and all frames below them."""
    # If torch has renamed these internals, do without: the attributes that `uncompiled` sets
    # still keep the compiler out.
    with suppress(ImportError, AttributeError):
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
