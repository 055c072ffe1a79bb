"""`index.bin`: a round trip, the search for a region, and every way to corrupt it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.catalog.findings import kind_of
from holdfast.errors import DamagedError, FormatError
from holdfast.format import checksum
from holdfast.format.chunks import BLOCK_BYTES, ChunkRows
from holdfast.format.manifest import (
    Chunk,
    Manifest,
    Span,
    Table,
    TensorEntry,
    decode,
    encode_around,
)
from holdfast.format.region import Region
from holdfast.format.tables import TensorTable, encode_rows
from manifest_bytes import encode_with_rows, sealed

FILE = "__0_0.distcp"


def opened(head: bytes, data: bytes, reads: list[int] | None = None) -> Manifest:
    """Decode a manifest that reads its rows from `data`, and notes the bytes of each read."""
    manifest = decode(head, where="folder/manifest.json")
    assert manifest.rows is not None

    def fetch(start: int, stop: int) -> bytes:
        if reads is not None:
            reads.append(stop - start)
        return data[start:stop]

    manifest.rows.connect(fetch, "folder/index.bin", BLOCK_BYTES)
    return manifest


def manifest_of(regions: dict[str, tuple[tuple[int, ...], Sequence[Region]]]) -> Manifest:
    """Make a manifest of uint8 tensors with these shapes and chunks, one after the other in a
    file."""
    tensors, offset = {}, 0
    for name, (shape, boxes) in regions.items():
        chunks: list[Chunk] = []
        for box in boxes:
            item = Span(offset, 64 + box.num_elements)
            chunks.append(Chunk(box, FILE, item, offset + 64, len(chunks)))
            offset = item.stop
        tensors[name] = TensorEntry("uint8", shape, tuple(chunks), (name,))
    table = Table(offset, 7)
    nbytes = offset + checksum.NBYTES * (offset + 1)
    return Manifest(tensors, {}, files={FILE: nbytes}, tables={FILE: table}, kind="model")


def in_order(manifest: Manifest) -> Manifest:
    """The manifest with the chunks of each tensor as a tuple, sorted by their start."""

    def entry(of: TensorEntry) -> TensorEntry:
        return of._replace(chunks=tuple(sorted(of.chunks, key=lambda chunk: chunk.region.start)))

    tensors = {name: entry(tensor) for name, tensor in manifest.tensors.items()}
    return replace(manifest, tensors=tensors, rows=None)


@st.composite
def partitions(draw: st.DrawFn, box: Region, depth: int = 5) -> list[Region]:
    """Boxes that make up `box`: cut along any dim, then each half along any other."""
    dims = [d for d, size in enumerate(box.shape) if size > 1]
    if not depth or not dims or draw(st.integers(0, 5)) == 0:
        return [box]
    dim = draw(st.sampled_from(dims))
    cut = draw(st.integers(box.start[dim] + 1, box.stop[dim] - 1))
    low = Region(box.start, (*box.stop[:dim], cut, *box.stop[dim + 1 :]))
    high = Region((*box.start[:dim], cut, *box.start[dim + 1 :]), box.stop)
    return [*draw(partitions(low, depth - 1)), *draw(partitions(high, depth - 1))]


SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape, and boxes that make it up, in any order."""
    shape = draw(SHAPES)
    return shape, draw(st.permutations(draw(partitions(Region.whole(shape)))))


@settings(max_examples=200)
@given(st.data())
def test_a_search_finds_the_chunks_that_a_scan_of_all_finds(data: st.DataObject) -> None:
    """G6. Method: tensors divided into any boxes; chunks that hold elements of any region, compared
    with a look at every chunk."""
    manifest = manifest_of({name: data.draw(divided()) for name in ("a", "b", "c")})
    found = opened(*encode_with_rows(manifest))
    assert in_order(found) == in_order(manifest)
    for name, entry in manifest.tensors.items():
        chunks = found.tensors[name].chunks
        assert isinstance(chunks, ChunkRows)
        bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in entry.shape]
        wanted = Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))
        holding = [chunk for chunk in entry.chunks if (chunk.region & wanted).num_elements]
        assert sorted(chunks.overlapping(wanted), key=str) == sorted(holding, key=str)
        for number in range(-len(chunks), len(chunks)):
            assert chunks[number] == [*chunks][number]
        assert [*chunks[1:]] == [*chunks][1:]


def even_shards(size: int, num_tensors: int, dim: int) -> tuple[bytes, bytes]:
    """Encode tensors that `size` ranks have in equal shards along `dim`."""
    shape = (size * 3, 4) if dim == 0 else (4, size * 3)
    start = np.zeros((size, 2), np.int64)
    start[:, dim] = np.arange(size) * 3
    stop = np.tile(np.array(shape), (size, 1))
    stop[:, dim] = start[:, dim] + 3
    places = np.zeros((size, 5), np.int64)
    places[:, 2] = 100
    tables = [
        TensorTable(f"t{n}", "uint8", shape, (f"t{n}",), start, stop, places.copy())
        for n in range(num_tensors)
    ]
    rows = encode_rows(tables)
    manifest = Manifest({}, {}, files={FILE: 1008}, tables={FILE: Table(1000, 7)}, kind="model")
    head = encode_around(replace(manifest, rows=rows.file), rows.tensors)
    return b"".join(head), b"".join(rows.parts)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_reads_few_blocks_of_each_tensor(dim: int) -> None:
    """G13. Method: rows of 2,048 even shards; what each of several ranks reads to find its own."""
    size, num_tensors = 2048, 20
    head, data = even_shards(size, num_tensors, dim)
    for rank in (0, 1, 1023, 2047):
        reads: list[int] = []
        manifest = opened(head, data, reads)
        for entry in manifest.tensors.values():
            start, stop = [0, 0], [*entry.shape]
            start[dim], stop[dim] = rank * 3, rank * 3 + 3
            (chunk,) = entry.chunks_in(Region(tuple(start), tuple(stop)))
            assert chunk.region == Region(tuple(start), tuple(stop))
        table_bytes, *blocks = reads
        assert table_bytes == -(-len(data) // (BLOCK_BYTES + 8)) * 8
        # A row may begin in one block and end in the next. Where all rows begin alike along dim 0,
        # the first and the last row show that.
        assert sum(blocks) <= num_tensors * BLOCK_BYTES * (3 if dim == 0 else 5)


def test_the_manifest_does_not_grow_with_the_number_of_ranks() -> None:
    """G13. Method: the bytes that a load sends to each rank, for 64 and for 2,048 ranks."""
    sent = [len(pickle.dumps(opened(*even_shards(size, 50, 0)))) for size in (64, 2048)]
    assert sent[1] < sent[0] + 500


def test_every_flipped_bit_of_the_rows_is_found() -> None:
    """G3. Method: each byte of the rows and their table, with one bit flipped."""
    halves = [Region((n,), (n + 1,)) for n in range(100)]
    head, data = encode_with_rows(manifest_of({"w": ((100,), halves)}))
    assert len(data) > BLOCK_BYTES
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << position % 8
        manifest = opened(head, bytes(broken))
        assert manifest.rows is not None
        with pytest.raises(DamagedError, match=r"folder/index\.bin") as raised:
            manifest.rows.check()
        assert raised.value.file == "folder/index.bin"


def test_only_a_damaged_block_that_is_needed_is_refused() -> None:
    """G3. Method: the last block is damaged; chunks of the first block, then all."""
    rows = [Region((n,), (n + 1,)) for n in range(200)]
    head, data = encode_with_rows(manifest_of({"w": ((200,), rows)}))
    broken = bytearray(data)
    broken[BLOCK_BYTES * 2] ^= 1
    entry = opened(head, bytes(broken)).tensors["w"]
    assert [c.region for c in entry.chunks_in(Region((3,), (5,)))] == rows[3:5]
    with pytest.raises(DamagedError, match="block 2 has checksum"):
        list(entry.chunks)


def test_a_file_that_ends_early_is_damaged() -> None:
    """G3. Method: every length of `index.bin` that is too short."""
    head, data = encode_with_rows(manifest_of({"w": ((4,), [Region((0,), (4,))])}))
    for stop in range(len(data)):
        manifest = opened(head, data[:stop])
        assert manifest.rows is not None
        with pytest.raises(DamagedError):
            manifest.rows.check()


@pytest.mark.parametrize(
    ("number", "value"),
    [(0, 1), (1, 900), (2, 2), (3, 65), (4, 900), (5, 5), (6, 5), (0, 2**63), (1, 2**64 - 1)],
)
def test_rows_that_contradict_the_manifest_are_refused(number: int, value: int) -> None:
    """G8. Method: one number of a row replaced, with correct checksums."""
    manifest = manifest_of({"w": ((4,), [Region((0,), (4,))])})
    _, data = encode_with_rows(manifest)
    numbers = np.frombuffer(data, "<u8").copy()
    numbers[number] = value
    rows = numbers[:7].tobytes()
    table = checksum.pack([checksum.checksum(rows)])
    index = [64, 56, checksum.to_hex([checksum.checksum(table)])]
    body = body_of(manifest)
    found = opened(sealed({**body, "index": index}), rows + table)
    with pytest.raises(FormatError, match=r"folder/index\.bin"):
        list(found.tensors["w"].chunks)


def body_of(manifest: Manifest) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(encode_with_rows(manifest)[0])
    del body["checksum"]
    return body


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("index",), None),
        (("index",), [64, 56]),
        (("index", 0), 72),
        (("index", 0), 56),
        (("index", 0), "64"),
        (("index", 1), -8),
        (("index", 2), "7"),
        (("tensors", "w", "rows"), None),
        (("tensors", "w", "rows"), [0, 1]),
        (("tensors", "w", "rows"), [0, 1, 4, 4]),
        (("tensors", "w", "rows", 0), 8),
        (("tensors", "w", "rows", 0), -56),
        (("tensors", "w", "rows", 0), 1),
        (("tensors", "w", "rows", 1), 2),
        (("tensors", "w", "rows", 1), 1 << 70),
        (("tensors", "w", "rows", 2), -1),
        (("tensors", "w", "rows", 2), 1.5),
    ],
)
def test_a_manifest_that_contradicts_its_rows_is_refused(path: tuple[Any, ...], value: Any) -> None:
    """G8. Method: one field replaced, with a correct checksum."""
    body = body_of(manifest_of({"w": ((4,), [Region((0,), (4,))])}))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError):
        decode(sealed(body), where="m")


def test_a_wrong_largest_size_hides_chunks_but_gives_no_wrong_ones() -> None:
    """G8. Method: a manifest with correct checksums says that chunks are shorter than they are."""
    body = body_of(manifest_of({"w": ((8,), [Region((0,), (6,)), Region((6,), (8,))])}))
    body["tensors"]["w"]["rows"][2] = 1
    _, data = encode_with_rows(manifest_of({"w": ((8,), [Region((0,), (6,)), Region((6,), (8,))])}))
    entry = opened(sealed(body), data).tensors["w"]
    assert [chunk.region for chunk in entry.chunks_in(Region((5,), (7,)))] == [Region((6,), (8,))]


def test_tied_tensors_share_their_rows() -> None:
    """Method: two names of one table, and a tensor with equal numbers in a table of its own."""
    start = np.zeros((1, 1), np.int64)
    one = TensorTable("a", "uint8", (4,), ("a",), start, start + 4, [[0, 0, 9, 5, 0]])
    other = one._replace(name="c", places=[[0, 0, 9, 5, 0]])
    rows = encode_rows([one, one._replace(name="b"), other])
    assert [member["rows"] for member in json.loads(rows.tensors).values()] == [
        [0, 1, 4],
        [0, 1, 4],
        [56, 1, 4],
    ]
    assert len(b"".join(rows.parts)) == 2 * 56 + 8


def test_a_copy_for_another_rank_has_neither_store_nor_rows() -> None:
    """Method: pickled and copied after the rows were read; it reads again once connected."""
    head, data = encode_with_rows(manifest_of({"w": ((4,), [Region((0,), (4,))])}))
    manifest = opened(head, data)
    chunks = list(manifest.tensors["w"].chunks)
    for other in (pickle.loads(pickle.dumps(manifest)), copy.deepcopy(manifest)):
        assert other == manifest
        with pytest.raises(AssertionError, match="connect"):
            list(other.tensors["w"].chunks)
        assert other.rows is not None
        other.rows.connect(lambda start, stop: data[start:stop], "m", BLOCK_BYTES)
        assert list(other.tensors["w"].chunks) == chunks


def test_a_head_without_entries_needs_no_rows() -> None:
    """Method: as `list` and retention read it."""
    manifest = manifest_of({"w": ((4,), [Region((0,), (4,))])})
    head, _ = encode_with_rows(manifest)
    found = decode(head, where="m", entries=False)
    assert found == replace(manifest, tensors={}, kind=kind_of(manifest), rows=found.rows)
