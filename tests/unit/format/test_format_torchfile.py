"""`.pt` files: those of torch.save are read, corrupted ones are refused."""

from __future__ import annotations

import argparse
import io
import pickle
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
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
    assert item.stop <= len(data)
    flat = torch.tensor(list(data[item.offset : item.stop]), dtype=torch.uint8)
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


def test_lists_without_entries_of_their_own_are_one_value() -> None:
    """Method: the state of a random number generator and nested shapes are values, as in a save; a
    list with a dict or a tensor at some depth is not."""
    shapes = [[1, 2], [3, (4, 5)]]
    state = {"rng": (3, (1, 2), None), "shapes": shapes, "groups": [{"lr": 0.1}, ([3], {"lr": 1})]}
    manifest = read(saved({**state, "tensors": [[torch.ones(1)]]})).manifest
    assert {*manifest.values} == {"rng", "shapes", "groups.0.lr", "groups.1.0", "groups.1.1.lr"}
    assert {*manifest.tensors} == {"tensors.0.0"}
    shapes.append(shapes)
    with pytest.raises(FormatError, match="nested in one another"):
        read(saved({"shapes": shapes}))


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


class Scaled(torch.Tensor):
    """A tensor of a class of its own."""


def test_tensors_with_attributes_are_read_and_those_of_other_classes_left_out() -> None:
    """G8, G10. Method: a tensor and a parameter with an attribute, as DeepSpeed has, and a
    subclass, whose elements may be something else."""
    tagged, parameter = torch.arange(6.0), torch.nn.Parameter(torch.ones(2, 3))
    tagged.owner = parameter.owner = "rank 3"  # type: ignore[attr-defined]
    scaled = torch.ones(4).as_subclass(Scaled)
    data = saved({"tagged": tagged, "parameter": parameter, "scaled": scaled})
    contents = read(data)
    assert torch.equal(tensor_of(data, contents, "tagged"), torch.arange(6.0))
    assert torch.equal(tensor_of(data, contents, "parameter"), torch.ones(2, 3))
    assert contents.left_out == {"scaled": f"{__name__}.Scaled, with 1 tensor"}


def test_a_tensor_that_is_conjugated_lazily_is_refused() -> None:
    """G8. Method: its storage has the elements of the other tensor."""
    with pytest.raises(FormatError, match="conjugated or negated"):
        read(saved({"a": torch.ones(2, dtype=torch.complex64).conj()}))


class Options(dict[str, Any]):
    """A dict of a class of its own, with attributes and a constructor with arguments by name."""

    def __init__(self, *, parent: object) -> None:
        super().__init__()
        self.parent = parent

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, object]]:
        return (), {"parent": self.parent}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_that_need_code_are_left_out_and_all_tensors_are_read(
    protocol: int, zipped: bool
) -> None:
    """G8, G10. Method: what Lightning's files have besides tensors: arguments, paths, numbers of
    numpy, dicts and lists of other classes, a module; nothing of it is imported."""
    options = Options(parent=None)
    options["a"] = [1, options]
    state = {
        "state_dict": {"w": torch.arange(6.0).view(2, 3)},
        "args": argparse.Namespace(lr=0.1),
        "path": PurePosixPath("/x"),
        "number": np.float32(2),
        "options": options,
        "model": torch.nn.Linear(2, 2),
        "kept": {"k": 2, "many": defaultdict(list, {"b": [1, 2]})},
        "keys": {Options: 3},
    }
    data = saved(state, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    contents = read(data)
    assert [*contents.manifest.tensors] == ["state_dict.w"]
    assert torch.equal(tensor_of(data, contents, "state_dict.w"), state["state_dict"]["w"])  # type: ignore[index]
    assert contents.manifest.values.keys() == {"kept.k", "kept.many.b", f"keys.{__name__}.Options"}
    assert contents.values["kept.many.b"] == [1, 2]
    assert contents.left_out.keys() == {"args", "path", "number", "options", "model"}
    assert contents.left_out["args"] == "argparse.Namespace"
    assert contents.left_out["model"] == "torch.nn.modules.linear.Linear, with 2 tensors"


def test_a_stream_of_torch_before_1_6_is_read_like_an_archive() -> None:
    """G10. Method: the legacy format, which torch still writes on request: views, transposed
    tensors, a parameter, several dtypes, values; every tensor bit for bit."""
    base = torch.arange(20.0).view(4, 5)
    state = {
        "model": torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).state_dict(),
        "parameter": torch.nn.Parameter(base.clone()),
        "views": [base[1:3], base.T, base[:, 2]],
        "half": base.to(torch.bfloat16),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3),
        "values": {"step": 7, "device": torch.device("cpu"), "dtype": torch.float16, "s": {1}},
    }
    archive = read(saved(state))
    loaded = torch.load(io.BytesIO(saved(state, _use_new_zipfile_serialization=False)))
    for protocol in (2, 4):
        data = saved(state, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        stream = read(data)
        assert stream.manifest.names() == archive.manifest.names()
        assert stream.strides == archive.strides
        assert stream.values["values.step"] == 7
        for name, entry in stream.manifest.tensors.items():
            expected = loaded
            for key in entry.path:
                expected = expected[key]
            assert torch.equal(tensor_of(data, stream, name), expected)


def test_a_stream_with_more_pickle_than_one_piece_is_read() -> None:
    """Method: 3 MB of pickle before the tensor. A stream that ends inside a storage is refused."""
    state = {"text": "x" * 3_000_000, "a": torch.ones(100)}
    data = saved(state, _use_new_zipfile_serialization=False)
    contents = read(data)
    assert torch.equal(tensor_of(data, contents, "a"), torch.ones(100))
    with pytest.raises(FormatError, match="ends inside of storage"):
        read(data[:-1])
    with pytest.raises(FormatError, match=r"cannot be read .*: it ends early"):
        read(data[:2_000_000])
    with pytest.raises(FormatError, match=r"torch\.save did not write"):
        read(pickle.dumps({"a": 1}))


def test_archives_of_other_functions_of_torch_are_named() -> None:
    """Method: TorchScript; a ZIP archive of another program."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        torch.jit.save(trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    with pytest.raises(FormatError, match="is a TorchScript archive") as refused:
        read(buffer.getvalue())
    assert "state_dict" in str(refused.value.hint)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notes.txt", "x" * 1000)
    with pytest.raises(FormatError, match="of another program"):
        read(other.getvalue())


def test_two_entries_of_one_name_are_refused() -> None:
    """Method: a key with a dot, and a dict in a dict."""
    with pytest.raises(FormatError, match="two entries"):
        read(saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}))


VALID = saved(OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(5, 2).T, c=[1, {"d": 2.5}]))


STREAM = saved(
    OrderedDict(
        a=torch.arange(6.0).view(2, 3), b=torch.ones(5, 2).T, c=[1, argparse.Namespace(d=2)]
    ),
    _use_new_zipfile_serialization=False,
)


@pytest.mark.parametrize("valid", [VALID, STREAM], ids=["archive", "stream"])
@settings(max_examples=300)
@given(data=st.data())
def test_a_corrupted_file_is_read_or_refused(valid: bytes, data: st.DataObject) -> None:
    """G8. Method: a valid file with bytes replaced, or truncated at either end. If it is read, all
    positions are inside the file."""
    broken = bytearray(valid)
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
