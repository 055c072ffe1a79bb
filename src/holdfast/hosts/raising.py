"""Errors of a framework's own code, while all ranks save or load together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from holdfast.comm import Ranks, gather_and_run
from holdfast.errors import HoldfastError, RankError


@contextmanager
def errors_on_all(
    ranks: Ranks,
    verb: str = "save",
    hint: str = "nothing was published; the checkpoints before are as they were",
) -> Iterator[None]:
    """Context that raises an error on all ranks if one rank fails in it: the error itself on the
    rank where it happened, and a RankError on the others, with this verb and hint.

    Collective: all ranks leave the context together.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:  # noqa: BLE001 - raised once the other ranks know
        error = raised
    described = None
    if error is not None:
        described = RankError(
            f"the {verb} failed with {type(error).__name__}: {error}",
            hint=hint,
        )
    try:
        if ranks.all_reduce_max([described is not None])[0]:
            gather_and_run(ranks, described, lambda _: None)
    except HoldfastError:
        if error is None:
            raise
    if error is not None:
        raise error
