"""Read and lay out safetensors files, and read and write the index of a folder with such files.

A file has eight bytes with the length of a JSON header, then the header, then the data (see the
README of https://github.com/huggingface/safetensors). The header has dtype, shape and position of
each tensor. The tensors fill the data without gaps. The format has no checksums, so a reader can
detect a truncated file, but not changed data.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.archive import Fetch
from holdfast.format.dtypes import dtype_of, nbytes_of
from holdfast.format.git_lfs import check_no_pointer
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Span,
    TensorEntry,
)
from holdfast.format.region import Region
from holdfast.format.untrusted import check_file_name, check_sizes
from holdfast.spelling import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"

HEADER_BYTES_MAX = 100_000_000
"""Maximum size of a header, as in the reference implementation."""

INDEX_BYTES_MAX = 100_000_000

LISTED_MAX = 50
"""Maximum number of problems that a message lists."""

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

_NAMES = {torch: ours for ours, torch in _DTYPES.items()}


def read_file(fetch: Fetch, nbytes: int, *, file: str, where: str) -> Manifest:
    """Return the manifest of a safetensors file of `nbytes`. Fetches only the file's header.

    `file`: name of the file in the manifest. Errors call the file `where`.

    Raises:
        FormatError: the file is not a safetensors file, or is truncated.
    """
    check_no_pointer(fetch, where=where)
    try:
        prefix = fetch(0, 8)
        if len(prefix) < 8:
            raise ValueError(f"{nbytes} bytes are too few")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(nbytes - 8, HEADER_BYTES_MAX):
            raise ValueError(f"a header of {length} bytes in a file of {nbytes}")
        header = fetch(8, length)
        if len(header) != length or not header.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        tensors = _tensors(parse_json(header), 8 + length, nbytes, file)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(f"`{where}` is not a safetensors file: {_reason(error)}") from error
    return Manifest(tensors, {}, files={file: nbytes})


def _tensors(
    header: Mapping[str, Any], start: int, nbytes: int, file: str
) -> dict[str, TensorEntry]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            _check_strings(entry)
            continue
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"`{name[:200]}` must have the keys dtype, shape and data_offsets")
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"`{name[:200]}` has unknown dtype {str(entry['dtype'])[:40]!r}")
        shape, (first, last) = check_sizes(entry["shape"]), check_sizes(entry["data_offsets"])
        whole = Region.whole(shape)
        if last - first != nbytes_of(dtype, shape):
            raise ValueError(
                f"`{name[:200]}`: {dtype} {list(shape)} does not fill bytes {first} to {last}"
            )
        if start + last > nbytes:
            raise ValueError(
                f"`{name[:200]}` ends at byte {start + last}, the file has {nbytes} bytes"
            )
        item = Span(start + first, last - first)
        chunk = Chunk(whole, file, item, item.offset)
        tensors[name] = TensorEntry(dtype, shape, (chunk,), (name,))
    _check_filled(tensors, start, nbytes)
    return tensors


def _check_filled(tensors: Mapping[str, TensorEntry], start: int, nbytes: int) -> None:
    """Refuse tensors that overlap or leave gaps."""
    spans = sorted((e.chunks[0].item.offset, e.chunks[0].item.stop, n) for n, e in tensors.items())
    spans = [(start, start, "the header"), *spans, (nbytes, nbytes, "the end of the file")]
    for (_, stop, name), (start, _, next_name) in pairwise(spans):
        if stop != start:
            how = "overlap" if start < stop else "leave a gap"
            raise ValueError(f"`{name[:200]}` and `{next_name[:200]}` {how} at byte {stop}")


def _check_strings(entry: object) -> None:
    if not isinstance(entry, dict) or {type(v) for v in entry.values()} - {str}:
        raise ValueError("`__metadata__` is no table of strings")


def read_index(data: bytes, *, where: str) -> dict[str, str]:
    """Decode the index file of safetensors or `.bin` shards. Return the file name for each tensor.

    Raises:
        FormatError: the bytes are not such an index, or it names a file outside of its folder.
    """
    if len(data) > INDEX_BYTES_MAX:
        raise FormatError(f"`{where}` has more than {INDEX_BYTES_MAX} bytes")
    try:
        weight_map = parse_json(data)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("`weight_map` is no object")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(f"`{where}` is not an index of weights: {_reason(error)}") from error
    for file in weight_map.values():
        check_file_name(file, where)
    return weight_map


_SHARD = re.compile(r"(.*?)([0-9]+)-of-([0-9]+)(.*)", re.ASCII | re.DOTALL)

_NUMBER_DIGITS_MAX = 9


def missing_shards(files: Iterable[str]) -> list[str]:
    """Return the names of missing shards, at most `LISTED_MAX`, given the files that exist.

    >>> missing_shards(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
    ['model-00002-of-00003.safetensors']
    """
    sets: dict[tuple[str, str, str], dict[int, str]] = {}
    for file in files:
        match = _SHARD.fullmatch(file)
        if match and max(len(match[2]), len(match[3])) <= _NUMBER_DIGITS_MAX:
            sets.setdefault((match[1], match[3], match[4]), {})[int(match[2])] = match[2]
    missing: list[str] = []
    for (before, total, after), present in sets.items():
        digits = len(next(iter(present.values())))
        # Most sets of shards are numbered from 1, a few from 0.
        first = 0 if 0 in present else 1
        absent = (n for n in range(first, first + int(total)) if n not in present)
        for number in islice(absent, LISTED_MAX - len(missing)):
            missing.append(f"{before}{number:0{digits}}-of-{total}{after}")
    return missing


def joined(
    parts: Mapping[str, Manifest], index: Mapping[str, str] | None, *, where: str
) -> Manifest:
    """Join the manifests of a folder's files. `parts`: manifest of each file, by file name.
    `index`: file name of each tensor; None if the folder has no index.

    Raises:
        FormatError: a tensor is in two files, or not in the file that the index names.
    """
    tensors: dict[str, TensorEntry] = {}
    problems = []
    for file, part in parts.items():
        for name, entry in part.tensors.items():
            if index is not None and index.get(name) != file:
                problems.append(f"`{name}` is in `{file}`, which the index does not say")
            elif name in tensors:
                problems.append(f"`{name}` is in `{tensors[name].chunks[0].file}` and in `{file}`")
            tensors[name] = entry
    for name, file in (index or {}).items():
        if name not in tensors:
            problems.append(f"`{name}` is not in `{file}`, contrary to the index")
    if problems:
        raise FormatError(
            f"`{where}`: {problems[0]}"
            if len(problems) == 1
            else f"`{where}`: {len(problems)} tensors are in the wrong place:"
            + listed(problems, LISTED_MAX),
            hint="without an index all weights are read: move away files of other models"
            if index is None
            else "download the folder again",
        )
    files = {file: size for part in parts.values() for file, size in part.files.items()}
    values = {name: value for part in parts.values() for name, value in part.values.items()}
    return Manifest(tensors, values, files=files, kind="model")


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """File layout of a safetensors file: the positions of its contents, and its header."""

    nbytes: int
    header: bytes
    """All bytes before the data."""

    tensors: Mapping[str, Span]
    """Position of each tensor's elements in the file."""


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> SafetensorsLayout:
    """Lay out a safetensors file, given the dtype and shape of each tensor.

    Tensors are sorted by decreasing itemsize, so that all are aligned. The header has
    `{"format": "pt"}`, which transformers requires, and is padded to a multiple of 8 bytes.

    Raises:
        FormatError: safetensors does not support one of the dtypes.
    """
    sizes = {name: dtype_of(dtype).itemsize for name, (dtype, _) in tensors.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(tensors, key=lambda name: -sizes[name]):
        dtype, shape = tensors[name]
        if dtype not in _NAMES:
            raise FormatError(f"`{name}`: safetensors has no {dtype}")
        stop = position + Region.whole(shape).num_elements * sizes[name]
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (position, stop)}
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    spans = {}
    for name in tensors:
        first, last = entries[name]["data_offsets"]
        spans[name] = Span(start + first, last - first)
    return SafetensorsLayout(start + position, struct.pack("<Q", len(text)) + text, spans)


def encode_index(files: Mapping[str, str], nbytes: int) -> bytes:
    """Encode `model.safetensors.index.json`, given the file of each tensor and the total bytes of
    all elements."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(files.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(data: bytes) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: the bytes are not JSON, or an object has a key twice.
        RecursionError: the JSON is nested too deep.
    """
    return json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key `{key[:200]}` is there twice")
    return members


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not valid in JSON")


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
