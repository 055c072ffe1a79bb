"""`.metadata`: torch unpickles what Holdfast writes, and Holdfast reads what torch pickles."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from holdfast.errors import FormatError
from holdfast.format.dcp import decode_metadata
from holdfast.format.dtypes import BY_NAME
from holdfast.format.dumper import Call, Dumper, Global, Instance
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry, ValueEntry
from holdfast.format.region import Region
from manifest_bytes import encode_metadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Generate manifests whose tensors are cut into chunks along their first dim."""
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    half, at = len(names) // 2, 0
    tensors, values = {}, {}
    for name in names[:half]:
        dtype = draw(st.sampled_from(sorted(BY_NAME)))
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
        inner = draw(st.sets(st.integers(0, shape[0]))) if shape else set()
        cuts = sorted({0, *shape[:1], *inner})
        regions = [Region.whole(shape)]
        if shape:
            regions = [
                Region((lo, *[0] * (len(shape) - 1)), (hi, *shape[1:])) for lo, hi in pairwise(cuts)
            ]
        chunks = []
        for number, region in enumerate(regions):
            nbytes = region.num_elements * BY_NAME[dtype].itemsize + 700
            chunks.append(Chunk(region, f"__{number}_0.distcp", Span(at, nbytes)))
            at += nbytes
        path = (name,) if draw(st.booleans()) else ("model", 3, name)
        tensors[name] = TensorEntry(dtype, shape, tuple(chunks), path)
    for name in names[half:]:
        values[name] = ValueEntry("__0_0.distcp", Span(at, 50), None, ("extra", name))
    return Manifest(tensors, values, versions={"dcp": "1.0.0"})


def as_stock(manifest: Manifest) -> Metadata:
    """Make the objects that stock DCP would have for this manifest."""
    entries: dict[str, Any] = {}
    storage = {}
    for name, tensor in manifest.tensors.items():
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size(tensor.shape),
            [
                ChunkStorageMetadata(torch.Size(c.region.start), torch.Size(c.region.shape))
                for c in tensor.chunks
            ],
        )
        for number, chunk in enumerate(tensor.chunks):
            index = MetadataIndex(name, torch.Size(chunk.region.start), number)
            storage[index] = _StorageInfo(chunk.file, chunk.item.offset, chunk.item.nbytes)
    for name, value in manifest.values.items():
        entries[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(
            value.file, value.item.offset, value.item.nbytes
        )
    paths = {name: entry.path for name, entry in manifest.tensors.items()}
    paths |= {name: entry.path for name, entry in manifest.values.items()}
    return Metadata(entries, paths, storage, None, "1.0.0")


@given(manifests())
def test_pickle_loads_metadata_of_holdfast_as_stock_classes(manifest: Manifest) -> None:
    """G10. Method: `pickle.loads` with the classes of torch, compared with objects made by torch;
    encoding again gives the same bytes, and decoding the same manifest."""
    data = encode_metadata(manifest)
    decoded = pickle.loads(data)
    expected = as_stock(manifest)
    assert type(decoded) is Metadata
    assert decoded == expected
    for index, info in decoded.storage_data.items():
        assert type(index) is MetadataIndex
        assert index.offset is None or type(index.offset) is torch.Size
        assert type(info) is _StorageInfo
    for entry in decoded.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            assert type(entry.size) is torch.Size
            assert entry.properties == TensorProperties(dtype=entry.properties.dtype)
    assert encode_metadata(manifest) == data
    assert decode_metadata(data, where="m") == manifest


@given(manifests())
def test_metadata_pickled_by_stock_is_read_as_the_same_manifest(manifest: Manifest) -> None:
    """G10. Method: objects of torch, pickled by Python, in every protocol that has been used."""
    stock = as_stock(manifest)
    for protocol in (2, 4, 5):
        assert decode_metadata(pickle.dumps(stock, protocol), where="m") == manifest


def test_the_metadata_of_a_real_stock_checkpoint_is_read(tmp_path: Path) -> None:
    """G10. Method: stock `save` of a nested state; its `.metadata` compared with the result of the
    stock reader. It has a `PosixPath`, which must be ignored."""
    state = {
        "model": {"w": torch.randn(3, 4), "half": torch.ones(5, dtype=torch.bfloat16)},
        "list": [torch.zeros(2), {"n": 1}],
        "scalar": torch.tensor(1.5),
        "text": "hello",
    }
    stock_save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    data = (tmp_path / "step-1" / ".metadata").read_bytes()
    stock = FileSystemReader(tmp_path / "step-1").read_metadata()
    decoded = decode_metadata(data, where="m")
    assert {*decoded.tensors, *decoded.values} == {*stock.state_dict_metadata}
    for name, tensor in decoded.tensors.items():
        expected = stock.state_dict_metadata[name]
        assert isinstance(expected, TensorStorageMetadata)
        assert f"torch.{tensor.dtype}" == str(expected.properties.dtype)
        assert tensor.shape == tuple(expected.size)
        (chunk,) = tensor.chunks
        info = stock.storage_data[MetadataIndex(name, torch.Size(chunk.region.start), 0)]
        assert (chunk.file, chunk.item) == (info.relative_path, Span(info.offset, info.length))
    paths = {name: entry.path for name, entry in decoded.tensors.items()}
    paths |= {name: entry.path for name, entry in decoded.values.items()}
    assert paths == stock.planner_data


SMALL = Manifest(
    tensors={
        "w": TensorEntry(
            "float32", (4,), (Chunk(Region((0,), (4,)), "__0_0.distcp", Span(0, 700)),), ("w",)
        )
    },
    values={"v": ValueEntry("__0_0.distcp", Span(700, 50), None, ("v",))},
    versions={"dcp": "1.0.0"},
)


class Attack:
    """An object whose pickle calls `os.system`."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("exit 1",)


def changed(**fields: Any) -> Metadata:
    """Return stock metadata with some of its fields replaced."""
    stock = as_stock(SMALL)
    for name, value in fields.items():
        setattr(stock, name, value)
    return stock


@pytest.mark.parametrize("field", ["planner_data", "storage_meta", "version"])
def test_code_in_any_field_is_refused_by_name(field: str) -> None:
    """G8. Method: stock metadata with an `os.system` in a field that Holdfast does not need; the
    stock reader would run it."""
    with pytest.raises(FormatError, match=r"`posix\.system`"):
        decode_metadata(pickle.dumps(changed(**{field: Attack()})), where="m")


@pytest.mark.parametrize("name", ["../step-400/__0_0.distcp", "/etc/passwd", "a/b", "..", ""])
def test_a_file_outside_of_the_folder_is_refused_by_name(name: str) -> None:
    """G8. Method: stock metadata with paths that leave the folder, which the stock reader
    follows."""
    stock = as_stock(SMALL)
    stock.storage_data[MetadataIndex("v")] = _StorageInfo(name, 0, 50)
    with pytest.raises(FormatError, match="outside of its folder") as refused:
        decode_metadata(pickle.dumps(stock), where="m")
    assert repr(name) in refused.value.what


def test_a_file_name_that_is_no_text_is_refused() -> None:
    """G8. Method: a `PosixPath` as the name of a file."""
    stock = as_stock(SMALL)
    stock.storage_data[MetadataIndex("v")] = _StorageInfo(PosixPath("/etc"), 0, 50)  # type: ignore[arg-type]
    with pytest.raises(FormatError):
        decode_metadata(pickle.dumps(stock), where="m")


def test_a_compressed_item_is_refused_by_name() -> None:
    """Method: the field that lists the transformations of an item by extensions of stock DCP."""
    stock = as_stock(SMALL)
    stock.storage_data[MetadataIndex("v")] = _StorageInfo("__0_0.distcp", 700, 50, ["zstd"])
    with pytest.raises(FormatError, match="`v` is compressed"):
        decode_metadata(pickle.dumps(stock), where="m")


def test_optional_fields_of_stock_metadata_may_be_missing() -> None:
    """G10. Method: no paths, no storage meta, no version."""
    stock = changed(planner_data=None, storage_meta=StorageMeta(), version=None)
    decoded = decode_metadata(pickle.dumps(stock), where="m")
    assert decoded.tensors == SMALL.tensors
    assert decoded.values == SMALL.values


class Items(dict[Any, Any]):
    """A dict for the pickle whose keys need not be hashable here."""

    def __init__(self, *pairs: tuple[Any, Any]) -> None:
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs


def stock_pickle(**replaced: Any) -> bytes:
    """Return the `.metadata` of one tensor of four float32, with one part replaced."""
    module = "torch.distributed.checkpoint.metadata"
    parts = {
        "dtype": Global("torch", "float32"),
        "size": Call(Global("torch", "Size"), ((4,),)),
        "offsets": (0,),
        "sizes": (4,),
        "relative_path": "__0_0.distcp",
        "offset": 0,
        "length": 700,
        "path": ("w",),
        "name": "w",
        **replaced,
    }
    properties = parts.get("properties", (parts["dtype"], None, False, None, False))
    chunk = Instance(
        Global(module, "ChunkStorageMetadata"), {k: parts[k] for k in ("offsets", "sizes")}
    )
    entry = Instance(
        Global(module, "TensorStorageMetadata"),
        {
            "properties": Instance(Global(module, "TensorProperties"), properties),
            "size": parts["size"],
            "chunks": parts.get("chunks", [chunk]),
        },
    )
    index = {"fqn": parts["name"], "index": 0, "offset": (0,)}
    info = {k: parts[k] for k in ("relative_path", "offset", "length")}
    storage = parts.get(
        "storage_data",
        Items(
            (
                Instance(Global(module, "MetadataIndex"), index),
                Instance(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), info),
            )
        ),
    )
    state = {
        "state_dict_metadata": Items((parts["name"], parts.get("entry", entry))),
        "planner_data": Items((parts["name"], parts["path"])),
        "storage_data": storage,
    }
    out = Dumper(b"\x80\x04")
    out.put(Instance(Global(module, "Metadata"), parts.get("state", state)))
    out.raw(b".")
    return out.take()


def test_hand_made_metadata_without_replaced_parts_is_read() -> None:
    """Method: the basis of the next tests."""
    assert decode_metadata(stock_pickle(), where="m").tensors == SMALL.tensors


REPLACED: dict[str, list[Any]] = {
    "properties": [(), None, {}, 7, ("float32",), {"dtype": "float32"}],
    "size": [None, (3,), (4, 1), (-4,), ("4",), 4, (None,), (True,)],
    "offsets": [None, (1,), (-1,), (0, 0), ("0",), ()],
    "sizes": [None, (5,), (-1,), (4, 1), ("4",), ()],
    "relative_path": [None, 3, ("a",), "../a"],
    "offset": [None, -1, "0", True],
    "length": [None, -1, "9", 15],  # 15 bytes cannot hold four float32
    "path": [(), 3, (None,), "w", ((),)],
    "name": [3, None, ("w",)],
    "entry": [None, 3, "w", {}],
    "chunks": [None, 3, [3], [None]],
    "state": [None, {}, 3, ()],
    "storage_data": [None, {}, 3, {"w": "w"}],
}
WRONG = [(part, value) for part, values in REPLACED.items() for value in values]


@pytest.mark.parametrize(("part", "value"), WRONG, ids=str)
def test_metadata_with_an_invalid_part_is_refused(part: str, value: Any) -> None:
    """G8. Method: one part replaced; only `FormatError` may be raised. Among the parts are sizes
    larger than the item, for which a reader must not allocate."""
    with pytest.raises(FormatError):
        decode_metadata(stock_pickle(**{part: value}), where="m")


@given(st.sampled_from(sorted({part for part, _ in WRONG})), st.data())
def test_metadata_with_any_part_replaced_is_read_or_refused(part: str, data: st.DataObject) -> None:
    """G8. Method: any plain value in place of any part; only `FormatError` may be raised."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
        max_leaves=4,
    )
    try:
        decode_metadata(stock_pickle(**{part: data.draw(anything)}), where="m")
    except FormatError:
        return


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", b"\x80\x04N.", b"\x80\x04}."])
def test_bytes_that_are_no_metadata_are_refused(data: bytes) -> None:
    """G8. Method: no bytes, half a pickle, and pickles of other objects."""
    with pytest.raises(FormatError):
        decode_metadata(data, where="m")
