"""Block-by-block streaming: read ahead, convert, and deliver in the order of writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np

from holdfast.errors import MismatchError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Path
from holdfast.format.region import Region
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import Tensors
from holdfast.tensors.numbers import convert, is_floating, too_large

BLOCK_BYTES = 32 << 20
"""Bytes of one block, in the wider of the source's and the target's dtype."""

AHEAD = 2
"""Number of blocks that are read while another is written. All blocks, with copies in another
dtype, take less than 400 MB."""

Advance = Callable[[int], None]
"""Callback that gets the number of bytes written since its last call."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write."""

    tensors: Tensors
    """Tensors to read from."""

    name: str
    """Name in `tensors`."""

    dtype: str
    """Dtype in the target."""

    path: Path
    """Keys from the root of the state to the tensor, for targets with nested dicts."""

    same_as: str = ""
    """Name of another output with the same tensor, if this output is only a further name; else
    empty."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors.infos[self.name].shape

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_elements * dtype_of(self.dtype).itemsize

    def regions(self) -> Iterator[Region]:
        """Return the blocks in which the tensor is read and written."""
        source_dtype = self.tensors.infos[self.name].dtype
        itemsize = max(dtype_of(source_dtype).itemsize, dtype_of(self.dtype).itemsize)
        return blocks(self.shape, itemsize, BLOCK_BYTES)

    def read(self, region: Region) -> memoryview:
        """Read the row-major bytes of a block, in the target's dtype.

        Raises:
            MismatchError: a number is too large for the target's dtype.
        """
        read, source = self.tensors.read(self.name, region), self.tensors.infos[self.name].dtype
        elements = convert(read, source, self.dtype)
        number = too_large(read, source, elements, self.dtype)
        if number is not None:
            raise MismatchError(
                f"`{self.name}` has a number that is too large for {self.dtype}: {number:g}",
                hint="`--dtype bfloat16` has nearly the range of float32",
            )
        return np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data


Outputs = Mapping[str, Output]
"""Outputs by their names in the target, in the order of writing."""


def dtype_for(tensors: Tensors, name: str, requested: str | None) -> str:
    """Return the dtype to write a tensor in: `requested`, unless the tensor must keep its dtype."""
    info = tensors.infos[name]
    if requested is None or info.fixed or not is_floating(info.write_dtype):
        return info.write_dtype
    return requested


@contextmanager
def read_ahead(outputs: Iterable[Output], advance: Advance) -> Iterator[Callable[[], memoryview]]:
    """Yield a function that returns the bytes of the next block of `outputs` at each call."""
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="holdfast-convert")
    waiting: deque[Future[memoryview]] = deque()
    remaining = ((output, region) for output in outputs for region in output.regions())

    def start_next() -> None:
        for output, region in remaining:
            waiting.append(pool.submit(output.read, region))
            return

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
