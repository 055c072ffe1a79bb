"""The archive of one tensor: torch reads those of Holdfast, Holdfast reads those of torch."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import FormatError
from holdfast.format.dtypes import BY_NAME, BY_STORAGE, dtype_of
from holdfast.format.manifest import Span
from holdfast.format.torchzip import (
    LARGE_BYTES,
    PAGE_BYTES,
    PHASE_BYTES,
    StoredTensor,
    contiguous_strides,
    frame,
    locate,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

SHAPES: list[tuple[int, ...]] = [
    (),
    (0,),
    (1,),
    (5,),
    (0, 3),
    (3, 0),
    (2, 3),
    (4, 0, 2),
    (2, 3, 4),
    (1, 1, 1, 1),
    (2, 1, 3, 2, 1),
    (300, 7),
    (70000,),
    (256, 256),
]


def random_bytes(nbytes: int) -> bytes:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).numpy().tobytes()


def raw(tensor: torch.Tensor) -> bytes:
    """Return the row-major bytes of a tensor of any dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes) -> Any:
    """Return a fetch for a file with these bytes, which returns fewer at its end."""

    def fetch(offset: int, nbytes: int) -> bytes:
        assert offset >= 0, "a store is never asked for bytes before its file"
        assert nbytes >= 0
        return data[offset : offset + nbytes]

    return fetch


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def elements(data: bytes, located: StoredTensor) -> torch.Tensor:
    """Make a tensor from the result of `locate`."""
    dtype = getattr(torch, located.dtype)
    itemsize = dtype_of(located.dtype).itemsize
    count = located.data.nbytes // itemsize
    if not count:
        return torch.empty(located.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)[located.data.offset :]
    flat = flat[: count * itemsize].clone().view(dtype)
    return flat.as_strided(located.shape, located.strides)


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_torch_load_reads_an_archive_of_every_dtype_and_shape(dtype: str) -> None:
    """G10. Method: `torch.load(weights_only=True)` of archives made by `frame` at odd positions;
    dtype, shape, strides and every byte. `locate` finds the same bytes."""
    for number, shape in enumerate(SHAPES):
        position = 37 * number
        data = random_bytes(prod(shape) * BY_NAME[dtype].itemsize)
        if dtype == "bool":
            data = bytes(byte & 1 for byte in data)
        prefix, suffix = frame(dtype, shape, position)
        loaded = torch.load(io.BytesIO(prefix + data + suffix), weights_only=True)
        assert str(loaded.dtype) == f"torch.{dtype}"
        assert tuple(loaded.shape) == shape
        assert loaded.stride() == contiguous_strides(shape)
        assert raw(loaded) == data
        item = Span(position, len(prefix) + len(data) + len(suffix))
        located = locate(from_bytes(bytes(position) + prefix + data + suffix), item, where="f")
        at = position + len(prefix)
        assert located == StoredTensor(Span(at, len(data)), dtype, shape, loaded.stride(), 0)


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_the_table_of_dtypes_agrees_with_torch(dtype: str) -> None:
    """Method: itemsize, and the storage class in a file of `torch.save`."""
    assert getattr(torch, dtype).itemsize == BY_NAME[dtype].itemsize
    with zipfile.ZipFile(io.BytesIO(saved(zeros(dtype)))) as archive:
        pickled = archive.read("archive/data.pkl")
    storage = BY_NAME[dtype].storage or "UntypedStorage"
    assert f"{storage}\n".encode() in pickled


def test_every_storage_class_belongs_to_one_dtype() -> None:
    """Method: the table inverted, twice."""
    assert {d.name for d in BY_STORAGE.values()} == {d.name for d in BY_NAME.values() if d.storage}


def test_other_zip_readers_list_the_archive() -> None:
    """G10. Method: Python's zipfile: names, order, sizes, no compression."""
    prefix, suffix = frame("int32", (2, 2), 5)
    data = random_bytes(16)
    with zipfile.ZipFile(io.BytesIO(prefix + data + suffix)) as archive:
        assert archive.namelist() == [
            f"archive/{name}" for name in ("data.pkl", "byteorder", "version", "data/0")
        ]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        assert [i.file_size for i in archive.infolist()][1:] == [6, 2, 16]


@given(
    st.sampled_from(sorted(BY_NAME)),
    st.lists(st.integers(0, 600), max_size=4).map(tuple),
    st.integers(0, 2**45),
)
def test_data_is_aligned_at_any_position_of_the_item(
    dtype: str, shape: tuple[int, ...], position: int
) -> None:
    """Method: any position; a multiple of 64 bytes, for large data 64 bytes after the start of a
    page, with less padding than one unit."""
    prefix, _ = frame(dtype, shape, position)
    large = prod(shape) * BY_NAME[dtype].itemsize >= LARGE_BYTES
    align = PAGE_BYTES if large else PHASE_BYTES
    assert (position + len(prefix) - PHASE_BYTES) % align == 0
    assert len(prefix) < 1024 + align


@given(st.lists(st.integers(0, 9), max_size=6))
def test_strides_are_those_of_torch(shape: list[int]) -> None:
    """Method: the strides of a tensor."""
    assert contiguous_strides(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize("nbytes", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 7, 5 * 2**40])
def test_an_archive_of_more_than_4_gib_is_read(nbytes: int) -> None:
    """G10. Method: an archive around virtual zeros: `locate`, and Python's zipfile on a file
    object that generates them, find the position and size of the data."""
    position = 3 * 2**33 + 5
    prefix, suffix = frame("uint8", (nbytes,), position)
    file = Virtual(prefix, nbytes, suffix)
    item = Span(position, file.size)
    located = locate(lambda at, n: file.at(at - position, n), item, where="f")
    assert located.data == Span(position + len(prefix), nbytes)
    assert located.shape == (nbytes,)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("archive/data/0")
        assert (info.file_size, info.compress_size) == (nbytes, nbytes)
        with archive.open(info) as data:
            assert file.tell() == len(prefix)
            assert data.read(10) == bytes(10)


class Virtual(io.RawIOBase):
    """A file of a head, zeros without memory, and a tail."""

    def __init__(self, head: bytes, zeros: int, tail: bytes) -> None:
        self._head, self._zeros, self._tail = head, zeros, tail
        self.size = len(head) + zeros + len(tail)
        self._position = 0

    def at(self, start: int, nbytes: int) -> bytes:
        stop = min(start + nbytes, self.size)
        assert stop - start < 1 << 20, "nobody needs that much to look for a tensor"
        tail_at = len(self._head) + self._zeros
        zeros = max(0, min(stop, tail_at) - max(start, len(self._head)))
        tail = self._tail[max(0, start - tail_at) : max(0, stop - tail_at)]
        return self._head[start:stop] + bytes(zeros) + tail

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def read(self, nbytes: int = -1) -> bytes:
        data = self.at(self._position, self.size if nbytes < 0 else nbytes)
        self._position += len(data)
        return data


def zeros(dtype: str) -> torch.Tensor:
    """Return six zeros. torch warns when it makes complex32, but not when it views other bytes
    so."""
    plain = torch.zeros(6 * BY_NAME[dtype].itemsize, dtype=torch.uint8)
    return plain.view(getattr(torch, dtype)).view(3, 2)


BASE = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
STORED: list[tuple[str, torch.Tensor]] = [
    ("whole", BASE),
    ("transposed", BASE.transpose(0, 2)),
    ("offset view", BASE[1:3]),
    ("offset and strided", BASE[1:, ::2, 1:4]),
    ("expanded", torch.arange(3.0).expand(4, 3)),
    ("0-d", torch.tensor(3.5)),
    ("0-d view", BASE[2, 3, 4]),
    ("empty", torch.empty(0, 4)),
    ("empty view", BASE[2:2]),
    ("parameter", torch.nn.Parameter(torch.randn(3, 4))),
    ("frozen parameter", torch.nn.Parameter(torch.randn(3, 4), requires_grad=False)),
    ("parameter of another dtype", torch.nn.Parameter(torch.randn(3, 4).to(torch.float8_e5m2))),
    ("large", torch.randn(200, 300)),
    *((dtype, zeros(dtype)) for dtype in sorted(BY_NAME)),
]


@pytest.mark.parametrize("tensor", [t for _, t in STORED], ids=[name for name, _ in STORED])
@pytest.mark.parametrize("position", [0, 12345])
def test_a_tensor_saved_by_torch_is_found(tensor: torch.Tensor, position: int) -> None:
    """G10. Method: `torch.save`, at the start of a file and inside one; the bytes and strides that
    `locate` returns give the tensor bit for bit."""
    archive = saved(tensor)
    data = bytes(position) + archive + b"next item"
    located = locate(from_bytes(data), Span(position, len(archive)), where="f")
    assert located.shape == tuple(tensor.shape)
    assert f"torch.{located.dtype}" == str(tensor.dtype)
    assert raw(elements(data, located)) == raw(tensor)


def test_the_crc_of_torch_is_found_if_it_covers_the_data() -> None:
    """G3. Method: zlib's CRC-32 over the data; a view that starts inside the storage has none."""
    import zlib

    for tensor, expected in ((BASE, True), (BASE[1:], False)):
        data = saved(tensor)
        located = locate(from_bytes(data), Span(0, len(data)), where="f")
        crc = zlib.crc32(data[located.data.offset : located.data.stop])
        assert located.crc32 == (crc if expected else 0)


@pytest.mark.parametrize(
    "value", [{"a": BASE}, [BASE], 3, "text", None, (BASE,), torch.Size([3]), torch.float32]
)
def test_an_archive_of_something_else_than_a_tensor_is_refused(value: object) -> None:
    """G8. Method: `torch.save` of other values."""
    data = saved(value)
    with pytest.raises(FormatError):
        locate(from_bytes(data), Span(0, len(data)), where="f")


def test_an_archive_that_refers_to_code_is_refused_by_name() -> None:
    """G8. Method: `torch.save` of an object whose class would be imported."""
    data = saved(partial(print, "hello"))
    with pytest.raises(FormatError, match=r"functools\.partial"):
        locate(from_bytes(data), Span(0, len(data)), where="f")


def rewritten(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Make an archive of these records with Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def records_of(saved_bytes: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(saved_bytes)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_compressed_archive_is_refused(compression: int) -> None:
    """Method: the records of a real archive, compressed."""
    data = rewritten(records_of(saved(BASE)), compression)
    with pytest.raises(FormatError, match="compressed"):
        locate(from_bytes(data), Span(0, len(data)), where="f")


def test_a_big_endian_tensor_is_refused() -> None:
    """Method: the record `byteorder`, replaced."""
    records = records_of(saved(BASE))
    data = rewritten({**records, "archive/byteorder": b"big"})
    with pytest.raises(FormatError, match="little-endian"):
        locate(from_bytes(data), Span(0, len(data)), where="f")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x04K\x05K\x06", b"K\x04K\x05K\x07"),  # a dim longer than the storage
        (b"K\x1eK\x06K\x01", b"K\x1fK\x06K\x01"),  # a stride that reaches past it
        (b"K\x1eK\x06K\x01", b"K\x1eK\x06\x89"),  # a stride that is no number
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"),  # a storage that is not there
    ],
)
def test_a_tensor_larger_than_its_data_is_refused(old: bytes, new: bytes) -> None:
    """G8. Method: sizes in the pickle of a real archive, replaced; no byte outside of it is
    returned."""
    records = records_of(saved(BASE))
    pickled = records["archive/data.pkl"]
    changed = pickled.replace(old, new)
    assert changed != pickled, "nothing was replaced"
    data = rewritten({**records, "archive/data.pkl": changed})
    with pytest.raises(FormatError):
        locate(from_bytes(data), Span(0, len(data)), where="f")


ARCHIVES = [
    saved(BASE),
    saved(torch.nn.Parameter(torch.randn(3).to(torch.float8_e5m2))),
    b"".join((*frame("float32", (3, 4), 0)[:1], bytes(48), *frame("float32", (3, 4), 0)[1:])),
]


@settings(max_examples=300)
@given(st.sampled_from(ARCHIVES), st.data())
def test_a_corrupted_archive_is_read_or_refused(archive: bytes, data: st.DataObject) -> None:
    """G8. Method: a valid archive, truncated at either end, or with bytes replaced outside of the
    data. Only `FormatError` may be raised, and no byte outside be returned."""
    broken = bytearray(archive)
    for _ in range(data.draw(st.integers(0, 4))):
        position_near_end = data.draw(st.integers(-700, 700)) % len(broken)
        byte = data.draw(st.integers(0, 255))
        broken[position_near_end] = byte
    first = data.draw(st.just(0) | st.integers(0, len(broken)))
    last = data.draw(st.just(len(broken)) | st.integers(first, len(broken)))
    stored = bytes(broken[first:last])
    claimed = Span(0, data.draw(st.just(len(stored)) | st.integers(0, 2 * len(stored) + 1)))
    try:
        located = locate(from_bytes(stored), claimed, where="f")
    except FormatError:
        return
    assert 0 <= located.data.offset <= located.data.stop <= claimed.nbytes
    assert len(located.shape) == len(located.strides)
    if prod(located.shape):
        reach = sum((n - 1) * s for n, s in zip(located.shape, located.strides, strict=True)) + 1
        assert reach * dtype_of(located.dtype).itemsize <= located.data.nbytes


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(stored: bytes) -> None:
    """G8. Method: any bytes, also with the signatures of an archive at their end."""
    for data in (stored, stored + b"PK\5\6" + stored[:18].ljust(18, b"\0")):
        with pytest.raises(FormatError):
            locate(from_bytes(data), Span(0, len(data)), where="f")


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_truncated_archive_is_refused(archive: bytes) -> None:
    """G3. Method: every prefix, once with the new size in the index and once with the old one."""
    for stop in range(len(archive)):
        with pytest.raises(FormatError):
            locate(from_bytes(archive[:stop]), Span(0, stop), where="f")
        with pytest.raises(FormatError):
            locate(from_bytes(archive[:stop]), Span(0, len(archive)), where="f")


V3 = b"ctorch._utils\n_rebuild_tensor_v3\n"
STORAGE = b"((X\x07\x00\x00\x00storagectorch.storage\nUntypedStorage\nX\x01\x00\x00\x000NNtQ"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + V3 + STORAGE + b"K\x00)))NtR.",  # too few arguments
        b"\x80\x02" + V3 + STORAGE + b"K\x00))\x89NK\x07tR.",  # a dtype that is a number
        b"\x80\x02" + V3 + STORAGE + b"K\x00))\x89N]tR.",  # a dtype that is a list
        b"\x80\x02" + V3 + STORAGE + b"NNN\x89NNtR.",  # nothing at all
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_parameter\n)RtR.",
        b"\x80\x02" + V3 + b".",
        b"\x80\x02ctorch\nSize\n(K\x01tR.",
        b"",
    ],
)
def test_a_pickle_of_allowed_names_in_a_wrong_order_is_refused(pickled: bytes) -> None:
    """G8. Method: hand-made pickles in place of the real one."""
    data = rewritten({**records_of(saved(BASE)), "archive/data.pkl": pickled})
    with pytest.raises(FormatError):
        locate(from_bytes(data), Span(0, len(data)), where="f")


def test_data_that_ends_after_its_item_is_refused() -> None:
    """G8. Method: an archive for 4800 bytes that has 48; its directory is found, only the size is
    wrong. The bytes after the item belong to another one."""
    prefix, suffix = frame("float32", (300, 4), 0)
    directory_at = (len(prefix) + 48).to_bytes(4, "little")
    data = prefix + bytes(48) + suffix[:-6] + directory_at + suffix[-2:]
    with pytest.raises(FormatError, match=r"outside of the archive|does not end at"):
        locate(from_bytes(data + bytes(10000)), Span(0, len(data)), where="f")
