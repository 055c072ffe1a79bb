"""safetensors: a file of named tensors, and a folder of such files with an index.

After https://github.com/huggingface/safetensors, its README: eight bytes with the length of a JSON
header, the header, the data. The header names dtype, shape and place of each tensor; together they
fill the data without a gap. No checksum is kept: what can be checked is that it is whole.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from holdfast.errors import FormatError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Span,
    TensorEntry,
    check_file_name,
    check_sizes,
)
from holdfast.format.region import Region

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"

HEADER_BYTES_MAX = 100_000_000
"""The limit of the format's own readers."""

INDEX_BYTES_MAX = 100_000_000

LISTED_MAX = 50

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

Fetch = Callable[[int, int], bytes]
"""`fetch(offset, nbytes)`: bytes of the file, fewer only where it ends."""


def read_file(fetch: Fetch, nbytes: int, *, file: str, where: str) -> Manifest:
    """The manifest of one safetensors file of `nbytes`. Fetches its header alone.

    Raises:
        FormatError: it is no such file, or not a whole one.
    """
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
            raise ValueError(f"`{name[:200]}` has other keys than dtype, shape and data_offsets")
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"`{name[:200]}` has dtype {str(entry['dtype'])[:40]!r}")
        shape, (first, last) = check_sizes(entry["shape"]), check_sizes(entry["data_offsets"])
        whole = Region.whole(shape)
        if last - first != whole.num_elements * dtype_of(dtype).itemsize:
            raise ValueError(
                f"`{name[:200]}`: {dtype} {list(shape)} does not take bytes {first} to {last}"
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
    """Refuse tensors that overlap, or leave bytes to nobody."""
    spans = sorted((e.chunks[0].item.offset, e.chunks[0].item.stop, n) for n, e in tensors.items())
    spans = [(start, start, "the header"), *spans, (nbytes, nbytes, "the end of the file")]
    for (_, before, one), (after, _, other) in pairwise(spans):
        if before != after:
            how = "overlap" if after < before else "leave a gap"
            raise ValueError(f"`{one[:200]}` and `{other[:200]}` {how} at byte {before}")


def _check_strings(entry: object) -> None:
    if not isinstance(entry, dict) or {type(v) for v in entry.values()} - {str}:
        raise ValueError("`__metadata__` is no table of strings")


def read_index(data: bytes, *, where: str) -> dict[str, str]:
    """The file that holds each tensor, from the bytes of `model.safetensors.index.json`.

    Raises:
        FormatError: it is no such index, or names a file outside of its folder.
    """
    if len(data) > INDEX_BYTES_MAX:
        raise FormatError(f"`{where}` has more than {INDEX_BYTES_MAX} bytes")
    try:
        weight_map = parse_json(data)["weight_map"]
        if not isinstance(weight_map, dict):
            raise ValueError("`weight_map` is no object")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(f"`{where}` is not a safetensors index: {_reason(error)}") from error
    for file in weight_map.values():
        check_file_name(file, where)
    return weight_map


_SHARD = re.compile(r"(.*?)([0-9]+)-of-([0-9]+)(.*)", re.ASCII | re.DOTALL)

_NUMBER_DIGITS_MAX = 9


def missing_shards(files: Iterable[str]) -> list[str]:
    """Names of the shards, up to `LISTED_MAX`, that are missing in sets of which some are there.

    >>> missing_shards(["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
    ['model-00002-of-00003.safetensors']
    """
    sets: dict[tuple[str, str, str], dict[int, str]] = {}
    for file in files:
        found = _SHARD.fullmatch(file)
        if found and max(len(found[2]), len(found[3])) <= _NUMBER_DIGITS_MAX:
            sets.setdefault((found[1], found[3], found[4]), {})[int(found[2])] = found[2]
    missing: list[str] = []
    for (before, total, after), there in sets.items():
        digits = len(next(iter(there.values())))
        # Most count from 1, a few from 0.
        first = 0 if 0 in there else 1
        lacking = (n for n in range(first, first + int(total)) if n not in there)
        for number in islice(lacking, LISTED_MAX - len(missing)):
            missing.append(f"{before}{number:0{digits}}-of-{total}{after}")
    return missing


def joined(
    parts: Mapping[str, Manifest], index: Mapping[str, str] | None, *, where: str
) -> Manifest:
    """One manifest of a folder, from those of its files. With an index, it alone says which file
    counts for which tensor.

    Raises:
        FormatError: a tensor that is not where the index has it, or that two files hold.
    """
    tensors: dict[str, TensorEntry] = {}
    wrong = []
    for file, part in parts.items():
        for name, entry in part.tensors.items():
            if index is not None and index.get(name) != file:
                wrong.append(f"`{file}` holds `{name}`, the index does not say so")
            elif name in tensors:
                wrong.append(f"`{name}` is in `{tensors[name].chunks[0].file}` and in `{file}`")
            tensors[name] = entry
    for name, file in (index or {}).items():
        if name not in tensors:
            wrong.append(f"`{name}` is not in `{file}`, where the index has it")
    if wrong:
        more = len(wrong) - LISTED_MAX
        raise FormatError(
            f"`{where}`: {wrong[0]}"
            if len(wrong) == 1
            else f"`{where}`: {len(wrong)} tensors are not where they should be:\n  "
            + "\n  ".join(wrong[:LISTED_MAX])
            + (f"\n  ... and {more} more" if more > 0 else ""),
            hint=f"without `{INDEX}` every `*{SUFFIX}` counts: move away what does not belong here"
            if index is None
            else "download the folder again",
        )
    files = {file: size for part in parts.values() for file, size in part.files.items()}
    return Manifest(tensors, {}, files=files, kind="model")


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """A file before it is written: its header, and where the elements of each tensor go."""

    nbytes: int
    header: bytes
    tensors: Mapping[str, Span]


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> SafetensorsLayout:
    """Where everything lies in a file of these tensors, given their dtypes and shapes.

    Larger elements come first, so that all are aligned; the header says `{"format": "pt"}`, which
    transformers asks for, and is padded to 8 bytes.

    Raises:
        FormatError: a dtype that the format has no name for.
    """
    sizes = {name: dtype_of(dtype).itemsize for name, (dtype, _) in tensors.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(tensors, key=lambda name: -sizes[name]):
        dtype, shape = tensors[name]
        if dtype not in _NAMES:
            raise FormatError(f"`{name}`: safetensors has no {dtype}")
        stop = at + Region.whole(shape).num_elements * sizes[name]
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (at, stop)}
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {}
    for name in tensors:
        first, last = entries[name]["data_offsets"]
        placed[name] = Span(start + first, last - first)
    return SafetensorsLayout(start + at, struct.pack("<Q", len(text)) + text, placed)


def encode_index(files: Mapping[str, str], nbytes: int) -> bytes:
    """The bytes of `model.safetensors.index.json`: the file of each tensor, and the bytes of all
    elements."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(files.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def parse_json(data: bytes) -> Any:
    """The JSON in these bytes.

    Raises:
        ValueError: no JSON, or an object with a key twice.
        RecursionError: nested too deep.
    """
    return json.loads(data, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key `{twice[:200]}` is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
