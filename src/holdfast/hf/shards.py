"""Layout of an export: which tensors go into which file, from names, dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from holdfast.format.dtypes import dtype_of
from holdfast.format.safetensors import SINGLE, SafetensorsLayout, encode_index, lay_out

SHARD_BYTES = 5_000_000_000
"""Default for the most bytes in one file, as in `save_pretrained` of transformers."""

DtypeAndShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExportLayout:
    """The files of an export, before they are written."""

    files: Mapping[str, SafetensorsLayout]
    """Layout of each file, by name."""

    index: bytes | None
    """Contents of `model.safetensors.index.json`; None for a single file."""

    dtype: str
    """Dtype with the most bytes."""

    dtypes: Mapping[str, str]
    """Dtype of each tensor."""

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.files.values())


def shard(tensors: Mapping[str, DtypeAndShape], max_shard_bytes: int = SHARD_BYTES) -> ExportLayout:
    """Assign whole tensors to files, one file after the other, in the given order."""
    groups: list[dict[str, DtypeAndShape]] = [{}]
    group_nbytes, nbytes_by_dtype = 0, dict[str, int]()
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * dtype_of(dtype).itemsize
        if groups[-1] and group_nbytes + nbytes > max_shard_bytes:
            groups.append({})
            group_nbytes = 0
        groups[-1][name] = (dtype, shape)
        group_nbytes += nbytes
        nbytes_by_dtype[dtype] = nbytes_by_dtype.get(dtype, 0) + nbytes
    most = max(nbytes_by_dtype, key=lambda dtype: nbytes_by_dtype[dtype], default="float32")
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    if len(groups) == 1:
        return ExportLayout({SINGLE: lay_out(groups[0])}, None, most, dtypes)
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    files = {file: lay_out(group) for file, group in zip(names, groups, strict=True)}
    index = {name: file for file, layout in files.items() for name in layout.tensors}
    total = sum(nbytes_by_dtype.values())
    return ExportLayout(files, encode_index(index, total), most, dtypes)
