"""Tensors block by block, each read ahead, converted, and handed on in the order it is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Path
from holdfast.format.region import Region
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import Tensors
from holdfast.tensors.numbers import convert, is_floating

BLOCK_BYTES = 32 << 20
"""Of one block, in the wider of the two dtypes."""

AHEAD = 2
"""Blocks that are read while one is written. With their copies on the way from one dtype to another
all of them stay below 400 MB."""

Advance = Callable[[int], None]
"""Told how many bytes more are written."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor as the target is to hold it."""

    tensors: Tensors
    """What it is read from."""

    name: str
    """There."""

    dtype: str
    """That the target keeps it in."""

    path: Path
    """Keys from the root of the state to it, where the target nests."""

    same_as: str = ""
    """The output that it is a second name of."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors.held[self.name].shape

    @property
    def nbytes(self) -> int:
        return Region.whole(self.shape).num_elements * dtype_of(self.dtype).itemsize

    def regions(self) -> Iterator[Region]:
        """The blocks that it is read in."""
        held = self.tensors.held[self.name].dtype
        itemsize = max(dtype_of(held).itemsize, dtype_of(self.dtype).itemsize)
        return blocks(self.shape, itemsize, BLOCK_BYTES)

    def read(self, region: Region) -> memoryview:
        """The bytes of a block, row by row."""
        found = self.tensors.read(self.name, region)
        made = convert(found, self.tensors.held[self.name].dtype, self.dtype)
        return np.ascontiguousarray(made).reshape(-1).view(np.uint8).data


Outputs = Mapping[str, Output]
"""By the names that the target gives them, in the order in which they are written."""


def dtype_for(tensors: Tensors, name: str, wanted: str | None) -> str:
    """What a tensor is to be stored in: `wanted`, if it is a number that may be."""
    held = tensors.held[name]
    if wanted is None or held.fixed or not is_floating(held.stored):
        return held.stored
    return wanted


@contextmanager
def read_ahead(
    wanted: Sequence[tuple[Output, Region]], advance: Advance
) -> Iterator[Callable[[], memoryview]]:
    """Call what this gives once for each of `wanted`, in order: the bytes of the next block."""
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="holdfast-convert")
    waiting: deque[Future[memoryview]] = deque()
    coming = iter(wanted)

    def start_next() -> None:
        following = next(coming, None)
        if following is not None:
            output, region = following
            waiting.append(pool.submit(output.read, region))

    def take() -> memoryview:
        block = waiting.popleft().result()
        start_next()
        advance(len(block))
        return block

    try:
        for _ in range(AHEAD):
            start_next()
        yield take
    finally:
        pool.shutdown(cancel_futures=True)
