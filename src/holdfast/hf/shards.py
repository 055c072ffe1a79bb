"""How the tensors of an export lie in its files: fixed by names, dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.format.dtypes import dtype_of
from holdfast.format.region import Region
from holdfast.format.safetensors import SINGLE, SafetensorsLayout, encode_index, lay_out

SHARD_BYTES = 5_000_000_000
"""Of one file, as the hub has them, unless asked for otherwise."""

TensorInfo = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


@dataclass(frozen=True, slots=True)
class Export:
    """The files of an export before a byte of them is written."""

    files: Mapping[str, SafetensorsLayout]
    """By name, each with the place of its tensors."""

    index: bytes | None
    """Of `model.safetensors.index.json`; None where there is one file."""

    dtype: str
    """What most elements are stored in."""

    dtypes: Mapping[str, str]
    """Of each tensor."""

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.files.values())


def shard(tensors: Mapping[str, TensorInfo], max_shard_bytes: int = SHARD_BYTES) -> Export:
    """Fill one file after the other, in the order given; a tensor is never cut.

    Raises:
        FormatError: a dtype that the format has no name for.
    """
    groups: list[dict[str, TensorInfo]] = [{}]
    held, total, by_dtype = 0, 0, dict[str, int]()
    for name, (dtype, shape) in tensors.items():
        nbytes = Region.whole(shape).num_elements * dtype_of(dtype).itemsize
        if groups[-1] and held + nbytes > max_shard_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = (dtype, shape)
        held, total = held + nbytes, total + nbytes
        by_dtype[dtype] = by_dtype.get(dtype, 0) + nbytes
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype], default="float32")
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    if len(groups) == 1:
        return Export({SINGLE: lay_out(groups[0])}, None, main, dtypes)
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    files = {file: lay_out(group) for file, group in zip(names, groups, strict=True)}
    index = {name: file for file, image in files.items() for name in image.tensors}
    return Export(files, encode_index(index, total), main, dtypes)
