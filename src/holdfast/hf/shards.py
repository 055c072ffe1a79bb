"""Layout of an export: which tensors go into which file, from names, dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from holdfast.format.dtypes import nbytes_of
from holdfast.format.safetensors import SUFFIX, SafetensorsLayout, encode_index, lay_out
from holdfast.tensors.numbers import is_floating

SHARD_BYTES = 5_000_000_000
"""Default for the most bytes in one file, as in `save_pretrained` of transformers."""

DtypeAndShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ExportLayout:
    """The files of an export, before they are written."""

    files: Mapping[str, SafetensorsLayout]
    """Layout of each file, by name."""

    index: bytes | None
    """Contents of the index, such as `model.safetensors.index.json`; None for a single file."""

    dtype: str
    """Dtype for `config.json`: the floating-point dtype with the most bytes; float32 if there is
    none."""

    dtypes: Mapping[str, str]
    """Dtype of each tensor."""

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.files.values())


def shard(
    tensors: Mapping[str, DtypeAndShape], max_shard_bytes: int = SHARD_BYTES, *, stem: str = "model"
) -> ExportLayout:
    """Assign whole tensors to files, in the given order. The next file begins when one would have
    more than `max_shard_bytes` of data. The names of all files begin with `stem`."""
    groups: list[dict[str, DtypeAndShape]] = [{}]
    group_nbytes = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = nbytes_of(dtype, shape)
        if groups[-1] and group_nbytes + nbytes > max_shard_bytes:
            groups.append({})
            group_nbytes = 0
        groups[-1][name] = (dtype, shape)
        group_nbytes += nbytes
    if len(groups) == 1:
        return lay_out_single(tensors, stem + SUFFIX)
    names = [f"{stem}-{n:05d}-of-{len(groups):05d}{SUFFIX}" for n in range(1, len(groups) + 1)]
    files = {file: lay_out(group) for file, group in zip(names, groups, strict=True)}
    index = {name: file for file, layout in files.items() for name in layout.tensors}
    single = lay_out_single(tensors, stem + SUFFIX)
    total = sum(span.nbytes for span in single.files[stem + SUFFIX].tensors.values())
    return replace(single, files=files, index=encode_index(index, total))


def lay_out_single(tensors: Mapping[str, DtypeAndShape], file: str) -> ExportLayout:
    """Assign all tensors to one file."""
    dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
    main = main_dtype(tensors.values()) or "float32"
    return ExportLayout({file: lay_out({**tensors})}, None, main, dtypes)


def main_dtype(tensors: Iterable[DtypeAndShape]) -> str | None:
    """Return the floating-point dtype with the most bytes; None if no tensor has one."""
    nbytes: dict[str, int] = {}
    for dtype, shape in tensors:
        # Count weights only: in small models, tables of indices may have more bytes than the
        # weights.
        if is_floating(dtype):
            nbytes[dtype] = nbytes.get(dtype, 0) + nbytes_of(dtype, shape)
    return max(nbytes, key=lambda dtype: nbytes[dtype], default=None)
