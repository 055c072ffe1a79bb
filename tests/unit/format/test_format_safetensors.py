"""safetensors files: those of its library are read, corrupted ones are refused."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_NAME
from holdfast.format.manifest import Manifest
from holdfast.format.safetensors import joined, read_file, read_index

UNKNOWN_THERE = {"complex128", "complex32"}
"""The library has no name for these."""


def read(data: bytes) -> Manifest:
    def fetch(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert nbytes >= 0
        return data[offset : offset + nbytes]

    return read_file(fetch, len(data), file="f.safetensors", where="f")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(BY_NAME.keys() - UNKNOWN_THERE - {"float4_e2m1fn_x2"}))
def test_tensors_written_by_the_library_are_found(dtype: str) -> None:
    """G10. Method: files of every dtype; name, dtype, shape, and the bytes at the position."""
    kind = getattr(torch, dtype)
    tensors = {
        "whole": torch.randint(0, 2, (3, 5)).to(kind),
        "scalar": torch.tensor(1).to(kind),
        "empty": torch.empty(0, 4, dtype=kind),
    }
    data = save(tensors, metadata={"format": "pt"})
    manifest = read(data)
    assert manifest.tensors.keys() == tensors.keys()
    assert manifest.files == {"f.safetensors": len(data)}
    for name, tensor in tensors.items():
        entry = manifest.tensors[name]
        assert (entry.dtype, entry.shape) == (dtype, tuple(tensor.shape))
        (chunk,) = entry.chunks
        assert chunk.data_offset == chunk.item.offset
        assert chunk.first_block is None
        assert data[chunk.item.offset : chunk.item.stop] == raw(tensor)


VALID = save(
    {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.int8)},
    metadata={"format": "pt"},
)


@settings(max_examples=300)
@given(st.data())
def test_a_corrupted_file_is_read_or_refused(data: st.DataObject) -> None:
    """G8. Method: a valid file with bytes replaced, or truncated at either end. If it is read, all
    positions are inside the file."""
    broken = bytearray(VALID)
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    first = data.draw(st.just(0) | st.integers(0, len(broken)))
    last = data.draw(st.just(len(broken)) | st.integers(first, len(broken)))
    part = bytes(broken[first:last])
    try:
        manifest = read(part)
    except FormatError:
        return
    for entry in manifest.tensors.values():
        assert 0 <= entry.chunks[0].item.offset <= entry.chunks[0].item.stop <= len(part)
        assert entry.chunks[0].item.nbytes == entry.nbytes


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(max_size=4) | st.just("__metadata__"),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
            ),
            max_leaves=8,
        ),
        max_size=3,
    )
)
def test_any_json_as_a_header_is_read_or_refused(header: Any) -> None:
    """G8. Method: any JSON object as the header."""
    text = json.dumps(header).encode()
    for data in (b"", bytes(16)):
        with suppress(FormatError):
            read(struct.pack("<Q", len(text)) + text + data)


def part_of(*names: str) -> Manifest:
    return read(save({name: torch.ones(2) for name in names}))


def test_only_the_index_decides_the_file_of_a_tensor() -> None:
    """Method: two files; indexes that are correct, lack a tensor, or name the wrong file."""
    parts = {"f1": part_of("a", "b"), "f2": part_of("c")}
    right = {"a": "f1", "b": "f1", "c": "f2"}
    whole = joined(parts, right, where="d")
    assert [*whole.tensors] == ["a", "b", "c"]
    assert whole.kind == "model"
    assert [*joined(parts, None, where="d").tensors] == ["a", "b", "c"]
    for wrong in ({"a": "f1", "c": "f2"}, right | {"d": "f2"}, right | {"a": "f2"}):
        with pytest.raises(FormatError, match="index"):
            joined(parts, wrong, where="d")
    with pytest.raises(FormatError, match="is in"):
        joined({"f1": part_of("a"), "f2": part_of("a")}, None, where="d")


def test_an_index_of_the_library_is_read() -> None:
    """Method: an index with all fields, some of which are ignored."""
    data = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "f1"}}).encode()
    assert read_index(data, where="i") == {"a": "f1"}
