"""Element-wise comparison of two tensors: how many elements differ, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from holdfast.catalog.source import Source
from holdfast.cli.elements import WITHOUT_NUMBERS, boxes, is_integer, numbers
from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.tensors.lazy import Tensors
from holdfast.tensors.numbers import Array

State = Literal["equal", "differs", "dtype", "shape", "only in a", "only in b"]
"""Result of a comparison. equal: dtype, shape and elements are equal. differs: some elements
differ. dtype: equal numbers in different dtypes. shape: different shapes. only in a, only in b: the
other checkpoint has no tensor of this name."""


@dataclass(frozen=True, slots=True)
class ComparedTensor:
    """Tensor of one checkpoint, to compare with a tensor of another."""

    tensors: Tensors
    name: str
    """Name of the tensor in `tensors`."""

    source: Source | None = None
    """Checkpoint with the tensor's checksums; None if the tensor is converted as it is read."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Result of comparing the two tensors that have the same name."""

    name: str
    state: State
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    num_elements: int = 0
    num_differing: int = 0
    max_abs: float = 0.0
    """Largest absolute difference of two elements at one index; infinite if only one is NaN."""

    max_rel: float = 0.0
    """Largest difference of two elements at one index, relative to the larger absolute value."""

    by_checksum: bool = False
    """Whether all checksums are equal, so that no element was read."""


def compare(
    name: str,
    a: ComparedTensor | None,
    b: ComparedTensor | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Compare two tensors. None stands for a tensor that a checkpoint lacks.

    If both have checksums and the same chunks, read only the chunks whose checksums differ. `name`
    is only for the result. `advance` gets the number of bytes compared since its last call.
    """
    a_held = a.tensors.infos[a.name] if a else None
    b_held = b.tensors.infos[b.name] if b else None
    dtypes = (a_held.dtype if a_held else None, b_held.dtype if b_held else None)
    shapes = (a_held.shape if a_held else None, b_held.shape if b_held else None)
    if a is None or b is None:
        return Difference(name, "only in a" if b is None else "only in b", dtypes, shapes)
    if shapes[0] != shapes[1]:
        return Difference(name, "shape", dtypes, shapes)
    whole = Region.whole(shapes[0] or ())
    regions = list(_regions_to_read(a, b, whole))
    num_differing, max_abs, max_rel = 0, 0.0, 0.0
    itemsize = max(dtype_of(dtype).itemsize for dtype in dtypes if dtype)
    for region in regions:
        for box in boxes(region, itemsize):
            elements = a.tensors.read(a.name, box), b.tensors.read(b.name, box)
            box_differing, box_abs, box_rel = _differences(elements[0], elements[1], dtypes)
            num_differing += box_differing
            max_abs, max_rel = max(max_abs, box_abs), max(max_rel, box_rel)
            advance(box.num_elements * itemsize)
    if num_differing:
        state: State = "differs"
    else:
        state = "equal" if dtypes[0] == dtypes[1] else "dtype"
    return Difference(
        name=name,
        state=state,
        dtypes=dtypes,
        shapes=shapes,
        num_elements=whole.num_elements,
        num_differing=num_differing,
        max_abs=max_abs,
        max_rel=max_rel,
        by_checksum=not regions and whole.num_elements > 0,
    )


def nbytes_to_read(a: ComparedTensor, b: ComparedTensor) -> int:
    """Return the total of the numbers of bytes that `compare` will pass to its `advance`."""
    a_held, b_held = a.tensors.infos[a.name], b.tensors.infos[b.name]
    if a_held.shape != b_held.shape:
        return 0
    itemsize = max(dtype_of(a_held.dtype).itemsize, dtype_of(b_held.dtype).itemsize)
    regions = _regions_to_read(a, b, Region.whole(a_held.shape))
    return sum(region.num_elements * itemsize for region in regions)


def _regions_to_read(a: ComparedTensor, b: ComparedTensor, whole: Region) -> Iterator[Region]:
    """Yield the regions of all chunks whose checksums are not known to be equal in `a` and `b`.

    If only whole tensors can be compared, since they differ in dtype or chunks, or one of them is
    converted as it is read, yield `whole`: the region of the whole tensor.
    """
    if a.source is None or b.source is None:
        yield whole
        return
    entries = a.source.manifest.tensors[a.name], b.source.manifest.tensors[b.name]
    a_chunks, b_chunks = ({chunk.region: chunk for chunk in entry.chunks} for entry in entries)
    if entries[0].dtype != entries[1].dtype or a_chunks.keys() != b_chunks.keys():
        yield whole
        return
    itemsize = dtype_of(entries[0].dtype).itemsize
    for region, chunk in a_chunks.items():
        nbytes = region.num_elements * itemsize
        a_sums = a.source.checksums(chunk, nbytes)
        if nbytes and (a_sums is None or a_sums != b.source.checksums(b_chunks[region], nbytes)):
            yield region


def _differences(
    a: Array, b: Array, dtypes: tuple[str | None, str | None]
) -> tuple[int, float, float]:
    """Return how many elements differ, and the largest absolute and relative difference."""
    if dtypes[0] == dtypes[1]:
        if np.array_equal(_bits(a), _bits(b)):
            return 0, 0.0, 0.0
        if dtypes[0] in WITHOUT_NUMBERS:
            return int((a != b).sum()), np.inf, np.inf
    a_numbers, b_numbers = numbers(a, dtypes[0] or ""), numbers(b, dtypes[1] or "")
    with np.errstate(all="ignore"):
        differs = (a_numbers != b_numbers) & ~(np.isnan(a_numbers) & np.isnan(b_numbers))
        if dtypes[0] == dtypes[1] and is_integer(dtypes[0]):
            differs = a != b  # Large integers that differ can be equal as float64.
        deltas = np.abs(a_numbers - b_numbers)[differs]
        deltas = np.where(np.isnan(deltas), np.inf, deltas)
        larger = np.maximum(np.abs(a_numbers), np.abs(b_numbers))[differs]
        relative = np.where(np.isfinite(deltas), deltas / larger, np.inf)
    if not deltas.size:
        return 0, 0.0, 0.0
    return int(deltas.size), float(deltas.max()), float(relative.max())


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
