"""Join the files of a DeepSpeed ZeRO checkpoint in one manifest of all parameters, without torch.

This follows `zero_to_fp32.py`, which DeepSpeed puts beside its checkpoints. Each rank has a file
with its parts of flat float32 vectors. In a vector, the parameters follow one another:

* Stages 1 and 2: there is one vector per group of parameters. The parts of all ranks, one after the
  other, make up the vector.
* Stage 3: each parameter is divided among all ranks. Each rank has its part of every parameter.

The manifest describes each part as one or a few boxes of a parameter, so no data is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from holdfast.errors import FormatError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry
from holdfast.format.region import boxes_of_run
from holdfast.format.torchfile import TorchFile
from holdfast.format.untrusted import check_sizes

ZERO_OPTIMIZER = re.compile(
    r"(?:bf16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt", re.ASCII
)
"""Name of the file with a rank's parts. It has the rank's number in ZeRO and its number in tensor
parallelism."""

ZERO_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt", re.ASCII)
"""Name of a file with the parameters' names and shapes, the buffers and the frozen parameters.
Stage 3 has one such file per rank; stages 1 and 2 have one for all ranks."""

_OPTIMIZER = "optimizer_state_dict"

_STAGE_2 = f"{_OPTIMIZER}.single_partition_of_fp32_groups"
_STAGE_3 = f"{_OPTIMIZER}.fp32_flat_groups"
"""Path of the flat vectors in files of stage 3. In files of stages 1 and 2, it is `_STAGE_2`."""

UNIVERSAL_HINT = "DeepSpeed's ds_to_universal.py joins it"

_ALIGNED = 2
"""Stages 1 and 2 pad each group to a multiple of this number times the number of ranks."""


@dataclass(slots=True)
class _Vector:
    """Flat vector that is divided among several files."""

    itemsize: int = 4
    """Bytes per element. Frozen parameters may have other dtypes than float32."""

    pieces: list[tuple[str, int, int]] = field(default_factory=list)
    """For each part of the vector: its file, the offset of its first element there, and its number
    of elements."""

    def add(self, entry: TensorEntry) -> None:
        chunk = entry.chunks[0]
        if entry.dtype != "float32" or len(entry.shape) != 1 or chunk.data_offset is None:
            raise ValueError(f"a vector of {entry.dtype} {list(entry.shape)}, not of float32")
        self.pieces.append((chunk.file, chunk.data_offset, entry.shape[0]))

    @property
    def num_elements(self) -> int:
        return sum(count for *_, count in self.pieces)

    def ranges(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield where the elements from `start` to `stop` are: for each file that has some of them,
        the file, their offset in it, the index of the first one and one past that of the last."""
        first = 0
        for file, offset, count in self.pieces:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                yield file, offset + self.itemsize * (low - first), low, high
            first += count


def join(
    models: Mapping[str, TorchFile], optimizers: Mapping[str, TorchFile], *, where: str
) -> tuple[Manifest, tuple[str, ...]]:
    """Return a manifest of the parameters, in float32, and of the buffers. Also return notes for
    the user.

    `models`, `optimizers`: contents of the `*_model_states.pt` and the `*_optim_states.pt` files by
    name, in the order of the ranks.

    Raises:
        FormatError: files are missing or contradict each other, or the model is divided in a way
            that the files do not describe.
    """
    try:
        return _joined(models, optimizers)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else error
        raise FormatError(
            f"`{where}` is a checkpoint of DeepSpeed's ZeRO that cannot be joined: {reason}",
            hint=UNIVERSAL_HINT,
        ) from error


def _joined(
    models: Mapping[str, TorchFile], optimizers: Mapping[str, TorchFile]
) -> tuple[Manifest, tuple[str, ...]]:
    if not models:
        raise ValueError("no `*_model_states.pt` is beside the parts")
    first_model = next(iter(models.values()))
    first_rank = next(iter(optimizers.values()))
    is_stage_3 = any(name.startswith(_STAGE_3) for name in first_rank.manifest.tensors)
    num_ranks = _partition_count(first_rank)
    if num_ranks != len(optimizers):
        raise ValueError(f"{num_ranks} ranks wrote it, files of {len(optimizers)} are there")
    shapes = _shapes(first_model)
    key = _STAGE_3 if is_stage_3 else _STAGE_2
    groups = [_groups(part, key) for part in optimizers.values()]
    if is_stage_3:
        tensors = _stage_3(shapes, groups)
        tensors |= _frozen_3(models)
    else:
        tensors = _stage_2(shapes, groups, _paddings(first_rank))
        tensors |= _below(first_model, "frozen_param_fragments")
    buffers = {str(value) for value in _list_of(first_model, "buffer_names")}
    module = _below(first_model, "module")
    tensors |= {name: entry for name, entry in module.items() if name in buffers}
    for name, shared_with in _texts_below(first_model, "shared_params").items():
        if shared_with in tensors:
            tensors[name] = _renamed(tensors[shared_with], name)
    parts = (*models.values(), *optimizers.values())
    sizes = {name: size for part in parts for name, size in part.manifest.files.items()}
    notes = (
        "the parameters are the float32 copies of ZeRO's optimizer; the optimizer's other state is "
        "not read",
    )
    return Manifest(tensors, {}, files=sizes, kind="model"), notes


def _partition_count(part: TorchFile) -> int:
    """Return the number of ranks that wrote the checkpoint. `part`: file of a rank's optimizer,
    which may state the number once for each group of parameters."""
    counts = part.values.get(f"{_OPTIMIZER}.partition_count")
    if counts is None:
        raise KeyError("partition_count")
    (count,) = {*counts} if isinstance(counts, list | tuple) else {counts}
    return int(*check_sizes((count,)))


def _shapes(model: TorchFile) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters by name, for each group of parameters."""
    groups: dict[int | str, dict[str, tuple[int, ...]]] = {}
    for name, entry in model.manifest.values.items():
        if entry.path[0] == "param_shapes" and len(entry.path) == 3:
            shape = check_sizes(model.values[name])
            groups.setdefault(entry.path[1], {})[str(entry.path[2])] = shape
    if not groups:
        raise KeyError("param_shapes")
    return list(groups.values())


def _groups(part: TorchFile, key: str) -> list[TensorEntry]:
    groups = [e for name, e in part.manifest.tensors.items() if name.startswith(f"{key}.")]
    if not groups:
        raise KeyError(key)
    return groups


def _paddings(part: TorchFile) -> dict[int, Sequence[int]]:
    """Return the number of padding elements after each parameter, for each group of parameters by
    the group's number."""
    found: dict[int, Sequence[int]] = {}
    for name, entry in part.manifest.values.items():
        if entry.path[:2] == (_OPTIMIZER, "param_alignment_paddings") and len(entry.path) == 3:
            value = part.values[name]
            found[int(entry.path[2])] = check_sizes(value)
    return found


def _stage_2(
    shapes: Sequence[Mapping[str, tuple[int, ...]]],
    groups: Sequence[Sequence[TensorEntry]],
    paddings: Mapping[int, Sequence[int]],
) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for number, names in enumerate(shapes):
        vector = _Vector()
        for of_rank in groups:
            vector.add(of_rank[number])
        padding = paddings.get(number) or [0] * len(names)
        position = 0
        for (name, shape), extra in zip(names.items(), padding, strict=True):
            tensors[name] = _entry(name, shape, vector, position)
            position += prod(shape) + extra
        aligned = _ALIGNED * len(groups)
        if -(-position // aligned) != -(-vector.num_elements // aligned):
            raise ValueError(
                f"group {number} has {vector.num_elements} elements, its parameters {position}"
            )
    return tensors


def _stage_3(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], groups: Sequence[Sequence[TensorEntry]]
) -> dict[str, TensorEntry]:
    vectors = []
    for of_rank in groups:
        vector = _Vector()
        for entry in of_rank:
            vector.add(entry)
        vectors.append(vector)
    tensors: dict[str, TensorEntry] = {}
    position = 0
    for name, shape in (item for names in shapes for item in names.items()):
        part = -(-prod(shape) // len(groups))
        pieces = _Vector()
        for vector in vectors:
            for file, offset, low, high in vector.ranges(position, position + part):
                pieces.pieces.append((file, offset, high - low))
        tensors[name] = _entry(name, shape, pieces, 0)
        position += part
    if any(vector.num_elements != position for vector in vectors):
        raise ValueError(f"a rank has another number of elements than its {position}")
    return tensors


def _frozen_3(models: Mapping[str, TorchFile]) -> dict[str, TensorEntry]:
    """Return the frozen parameters of stage 3. Each rank has a part of each parameter."""
    first = next(iter(models.values()))
    of_ranks = [_below(model, "frozen_param_fragments") for model in models.values()]
    tensors: dict[str, TensorEntry] = {}
    for name, value in first.manifest.values.items():
        path = value.path
        if path[0] != "frozen_param_shapes" or len(path) != 2:
            continue
        sizes, parameter = check_sizes(first.values[name]), str(path[1])
        fragments = [of_rank[parameter] for of_rank in of_ranks]
        dtype = fragments[0].dtype
        if any(entry.dtype != dtype for entry in fragments):
            raise ValueError(f"`{parameter}` has several dtypes")
        pieces = _Vector(dtype_of(dtype).itemsize)
        for entry in fragments:
            chunk = entry.chunks[0]
            if chunk.data_offset is None:
                raise ValueError(f"`{parameter}` is not contiguous")
            pieces.pieces.append((chunk.file, chunk.data_offset, prod(entry.shape)))
        tensors[parameter] = _entry(parameter, sizes, pieces, 0, dtype)
    return tensors


def _entry(
    name: str, shape: tuple[int, ...], vector: _Vector, start: int, dtype: str = "float32"
) -> TensorEntry:
    """Return the entry of a parameter whose first element is element `start` of a flat vector."""
    num_elements, itemsize = prod(shape), dtype_of(dtype).itemsize
    chunks: list[Chunk] = []
    for file, offset, low, high in vector.ranges(start, start + num_elements):
        position = offset
        for region in boxes_of_run(shape, low - start, high - low):
            item = Span(position, region.num_elements * itemsize)
            chunks.append(Chunk(region, file, item, item.offset))
            position = item.stop
    if sum(chunk.region.num_elements for chunk in chunks) != num_elements:
        raise ValueError(f"`{name}` has {num_elements} elements, more than its files")
    return TensorEntry(dtype, shape, tuple(chunks), (name,))


def _below(file: TorchFile, key: str) -> dict[str, TensorEntry]:
    """Return the tensors directly below a key of a file, by their names without that key."""
    return {
        str(entry.path[1]): _renamed(entry, str(entry.path[1]))
        for entry in file.manifest.tensors.values()
        if entry.path[0] == key and len(entry.path) == 2
    }


def _renamed(entry: TensorEntry, name: str) -> TensorEntry:
    return TensorEntry(entry.dtype, entry.shape, entry.chunks, (name,))


def _texts_below(file: TorchFile, key: str) -> dict[str, str]:
    return {
        str(entry.path[1]): str(file.values[name])
        for name, entry in file.manifest.values.items()
        if entry.path[0] == key and len(entry.path) == 2
    }


def _list_of(file: TorchFile, key: str) -> Sequence[object]:
    value = file.values.get(key, ())
    return value if isinstance(value, list | tuple) else ()
