"""`.pt` files: those of torch.save are read, corrupted ones are refused."""

from __future__ import annotations

import io
from collections import OrderedDict
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import FormatError
from holdfast.format.torchfile import TorchFile, read_file


def saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def read(data: bytes) -> TorchFile:
    def fetch(offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert nbytes >= 0
        return data[offset : offset + nbytes]

    return read_file(fetch, len(data), file="f.pt", where="f")


def tensor_of(data: bytes, contents: TorchFile, name: str) -> torch.Tensor:
    """Make a tensor from the bytes at the position that was found."""
    entry = contents.manifest.tensors[name]
    item = entry.chunks[0].item
    flat = torch.frombuffer(bytearray(data[item.offset : item.stop]), dtype=torch.uint8)
    typed = flat.view(getattr(torch, entry.dtype))
    if name in contents.strides:
        return typed.as_strided(entry.shape, contents.strides[name])
    assert entry.chunks[0].data_offset == item.offset
    return typed.view(entry.shape)


def test_every_tensor_of_a_training_state_is_found() -> None:
    """G10. Method: a module and an optimizer after a step; every tensor bit for bit, including
    views and transposed ones; values by name."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    base = torch.arange(20.0).view(4, 5)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": torch.nn.Parameter(base.clone()),
        "views": [base[1:3], base.T, base[:, 2]],
        "half": base.to(torch.bfloat16),
        "fp8": base.to(torch.float8_e4m3fn),
        "step": 7,
        "betas": (0.9, 0.95),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "bytes": b"abc",
        "set": {1, 2},
        "none": None,
    }
    data = saved(state)
    contents = read(data)
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    expected |= {f"views.{i}": view for i, view in enumerate([base[1:3], base.T, base[:, 2]])}
    expected |= {"parameter": base, "half": state["half"], "fp8": state["fp8"]}
    for number, moments in optimizer.state_dict()["state"].items():
        expected |= {f"optimizer.state.{number}.{key}": value for key, value in moments.items()}
    assert contents.manifest.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        loaded = tensor_of(data, contents, name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded.view(torch.uint8) if name == "fp8" else loaded,
                           tensor.view(torch.uint8) if name == "fp8" else tensor)  # fmt: skip
    assert contents.strides.keys() == {"views.1", "views.2"}
    assert {"step", "betas", "device", "dtype", "bytes", "set", "none"} <= {
        *contents.manifest.values
    }
    assert contents.manifest.tensors["model.0.weight"].path == ("model", "0.weight")


@pytest.mark.parametrize("value", [3, None, [], {}, torch.ones(2), [torch.ones(1)], "text"])
def test_a_file_of_one_value_is_read(value: object) -> None:
    """Method: files that contain no dict."""
    manifest = read(saved(value)).manifest
    assert len(manifest.names()) == 1


def test_a_file_that_refers_to_code_is_refused_by_name() -> None:
    """G8. Method: a file with a partial, and one with a whole module."""
    with pytest.raises(FormatError, match=r"functools\.partial"):
        read(saved({"a": partial(print)}))
    with pytest.raises(FormatError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read(saved(torch.nn.Linear(2, 2)))


def test_a_file_of_torch_before_1_6_is_refused_as_such() -> None:
    """Method: the legacy format, which torch still writes on request."""
    with pytest.raises(FormatError, match=r"before 1\.6") as refused:
        read(saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False))
    assert refused.value.hint


def test_two_entries_of_one_name_are_refused() -> None:
    """Method: a key with a dot, and a dict in a dict."""
    with pytest.raises(FormatError, match="two entries"):
        read(saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}))


VALID = saved(OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(5, 2).T, c=[1, {"d": 2.5}]))


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
        contents = read(part)
    except FormatError:
        return
    for entry in contents.manifest.tensors.values():
        assert 0 <= entry.chunks[0].item.offset <= entry.chunks[0].item.stop <= len(part)
