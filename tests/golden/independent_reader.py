"""A reader written from docs/format.md alone. It does not import Holdfast, and checks everything.

`read(folder)` uses `manifest.json`, `read_stock(folder)` uses `.metadata`, like stock DCP. Both
return tensors and values by name.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import zipfile
from collections import Counter, OrderedDict, defaultdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

DIGITS = 16


def digest(data: bytes) -> str:
    return f"{xxhash.xxh3_64_intdigest(data):016x}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Parse the JSON object; check its own checksum and all sizes."""
    data = (folder / "manifest.json").read_bytes()
    seal = b',"checksum":"' + b"?" * DIGITS + b'"}'
    text = data[: -len(seal)] + b"}"
    assert data[-len(seal) :] == seal.replace(b"?" * DIGITS, digest(text).encode())
    manifest: dict[str, Any] = json.loads(data)
    assert manifest["holdfast"] in (2, 3)
    known = [{"algorithm": "xxh3-64", "block_bytes": size} for size in (1 << 18, 1 << 20)]
    assert manifest["checksums"] in known
    values = [name for container in manifest["values"] for name in container["entries"]]
    assert not manifest["tensors"].keys() & {*values}
    assert len({*values}) == len(values)
    for name, nbytes, table, expected in manifest["files"]:
        data_file = (folder / name).read_bytes()
        assert len(data_file) == nbytes
        assert digest(data_file[table:]) == expected
    for stage in manifest.get("timings", {}).values():
        assert 0 <= stage["least"] <= stage["median"] <= stage["most"]
        assert type(stage["slowest"]) is int
    assert all(type(name) is str for name in manifest.get("components", []))
    if manifest["metadata"]:
        nbytes, expected = manifest["metadata"]
        metadata = (folder / ".metadata").read_bytes()
        assert (len(metadata), digest(metadata)) == (nbytes, f"{expected:016x}")
    if manifest["holdfast"] == 3:
        add_chunks(manifest["tensors"], manifest["index"], (folder / "index.bin").read_bytes())
    return manifest


def add_chunks(tensors: dict[str, Any], index: list[Any], data: bytes) -> None:
    """Check `index.bin`, and give each tensor its chunks, as version 2 lists them."""
    nbytes, table, expected = index
    assert (len(data), digest(data[table:])) == (nbytes, expected)
    blocks = [data[at : min(at + 4096, table)] for at in range(0, table, 4096)]
    found = [xxhash.xxh3_64_intdigest(block) for block in blocks]
    assert found == np.frombuffer(data[table:], "<u8").tolist()
    for tensor in tensors.values():
        dims = len(tensor["shape"])
        at, count, *longest = tensor["rows"]
        numbers = np.frombuffer(data, "<u8", count * (5 + 2 * dims), at)
        chunks = numbers.reshape(count, 5 + 2 * dims).tolist()
        assert chunks == sorted(chunks, key=lambda chunk: chunk[5 : 5 + dims])
        for dim, most in enumerate(longest):
            assert most == max(chunk[5 + dims + dim] - chunk[5 + dim] for chunk in chunks)
        tensor["chunks"] = chunks


def read(folder: Path) -> dict[str, Any]:
    """Read all entries of a checkpoint of Holdfast, and check every checksum."""
    manifest = read_manifest(folder)
    files = [(folder / name).read_bytes() for name, *_ in manifest["files"]]
    tables = [data[at:] for data, (_, _, at, _) in zip(files, manifest["files"], strict=True)]
    found: dict[str, Any] = {}
    for name, tensor in manifest["tensors"].items():
        found[name] = read_tensor(tensor, files, tables, manifest["checksums"]["block_bytes"])
        check_name(name, tensor.get("path"))
    for value in manifest["values"]:
        file, offset, nbytes = value["item"]
        container = files[file][offset : offset + nbytes]
        assert digest(container) == value["checksum"]
        for name, path in value["entries"].items():
            found[name] = torch.load(io.BytesIO(container), weights_only=True)
            check_name(name, path)
    return found


def read_state(folder: Path) -> dict[str, Any]:
    """Rebuild the state from the structure, by top-level name."""
    manifest, entries = read_manifest(folder), read(folder)
    paths = {name: tensor.get("path") or [name] for name, tensor in manifest["tensors"].items()}
    for value in manifest["values"]:
        paths |= {name: path or [name] for name, path in value["entries"].items()}
    leaves = {tuple(path): entries[name] for name, path in paths.items()}
    nodes = {tuple(path): node for path, node in manifest["structure"]}
    tops = dict.fromkeys(path[0] for path in (*leaves, *nodes))
    return {top: put_together((top,), nodes.get((top,)), leaves, nodes) for top in tops}


def put_together(path: Any, node: Any, leaves: dict[Any, Any], nodes: dict[Any, Any]) -> Any:
    if node is None and path in nodes:
        node = nodes[path]
    if node is None:
        if path in leaves:
            return leaves[path]
        keys = dict.fromkeys(p[len(path)] for p in (*leaves, *nodes) if p[: len(path)] == path)
        below = {key: put_together((*path, key), None, leaves, nodes) for key in keys}
        lists = all(type(key) is int for key in below)
        return [below[key] for key in sorted(below)] if lists else below
    if node == "array":
        return leaves[path].numpy()
    kind, what = next(iter(node.items()))
    if kind == "object":
        return put_together(path, what, leaves, nodes)
    if kind == "tensor":
        return leaves[path]
    if kind == "types":
        return with_types(leaves[path], [([literal(key) for key in keys], n) for keys, n in what])
    if kind in ("list", "tuple"):
        numbered = (put_together((*path, n), child, leaves, nodes) for n, child in enumerate(what))
        return {"list": list, "tuple": tuple}[kind](numbered)
    pairs = (
        what.items() if isinstance(what, dict) else ((literal(key), child) for key, child in what)
    )
    members = {key: put_together((*path, str(key)), child, leaves, nodes) for key, child in pairs}
    if kind == "defaultdict":
        return defaultdict({"list": list, "None": None}[node["default"]], members)
    return {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[kind](members)


def literal(text: str) -> Any:
    return ast.literal_eval(text)


def with_types(value: Any, places: list[tuple[list[Any], str]]) -> Any:
    for keys, name in places:
        if not keys:
            return b"" if name == "empty bytes" else np.dtype(name).type(value)
        key, rest = keys[0], (keys[1:], name)
        members = value.copy() if isinstance(value, dict) else list(value)
        members[key] = with_types(members[key], [rest])
        value = type(value)(members)
    return value


def check_name(name: str, path: list[str | int] | None) -> None:
    assert ".".join(map(str, path or [name])) == name


def read_tensor(
    tensor: dict[str, Any], files: list[bytes], tables: list[bytes], block: int
) -> torch.Tensor:
    """Join a tensor from its chunks; every element must be present once."""
    dtype = getattr(torch, tensor["dtype"])
    whole = torch.zeros(prod(tensor["shape"]) * dtype.itemsize, dtype=torch.uint8)
    target = whole.view(*tensor["shape"], dtype.itemsize)
    times = torch.zeros(tensor["shape"], dtype=torch.int32)
    for file, offset, nbytes, data, first_block, *region in tensor["chunks"]:
        start, stop = region[: len(region) // 2], region[len(region) // 2 :]
        shape = [b - a for a, b in zip(start, stop, strict=True)]
        container = files[file][offset : offset + nbytes]
        size = prod(shape) * dtype.itemsize
        raw = files[file][data : data + size]
        assert data % 4096 in (0, 64) if size >= 1 << 16 else data % 64 == 0
        for number, at in enumerate(range(0, size, block), first_block):
            found = int.from_bytes(tables[file][8 * number : 8 * number + 8], "little")
            assert found == xxhash.xxh3_64_intdigest(raw[at : at + block])
        check_container(container, raw, dtype, shape)
        box = tuple(map(slice, start, stop))
        if size:
            elements = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
            target[box] = elements.view(*shape, dtype.itemsize)
        times[box] += 1
    assert (times == 1).all()
    return whole.view(dtype).view(tensor["shape"])


def check_container(container: bytes, raw: bytes, dtype: torch.dtype, shape: list[int]) -> None:
    """Check that `torch.load` of the item gives the same elements."""
    with zipfile.ZipFile(io.BytesIO(container)) as archive:
        records = {i.filename: i for i in archive.infolist()}
    names = ("data.pkl", "byteorder", "version", "data/0")
    assert [*records] == [f"archive/{name}" for name in names]
    assert all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
    assert records["archive/data/0"].file_size == len(raw)
    loaded = torch.load(io.BytesIO(container), weights_only=True)
    assert (loaded.dtype, list(loaded.shape)) == (dtype, shape)
    assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def read_stock(folder: Path) -> dict[str, Any]:
    """Read all entries through `.metadata`. For our own files only: it runs pickles."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    found: dict[str, Any] = {}
    for index, info in metadata.storage_data.items():
        data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        loaded = torch.load(io.BytesIO(data), weights_only=True)
        entry = metadata.state_dict_metadata[index.fqn]
        if index.offset is None:
            found[index.fqn] = loaded
            continue
        if index.fqn not in found:
            plain = torch.zeros(entry.size.numel() * loaded.itemsize, dtype=torch.uint8)
            found[index.fqn] = plain.view(entry.properties.dtype).view(entry.size)
        box = tuple(slice(a, a + n) for a, n in zip(index.offset, loaded.shape, strict=True))
        found[index.fqn][box] = loaded
    assert found.keys() == metadata.state_dict_metadata.keys()
    return found
