"""Metadata of many chunks is not copied, and is the same as if it were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from holdfast.format import tables
from holdfast.format.chunks import Span
from holdfast.format.tables import Ints, StockIndex, TensorTable

FILES = [f"__{rank}_0.distcp" for rank in range(5)]


def table(name: str, dtype: str, rows: Ints, width: int) -> TensorTable:
    """A tensor of `width` columns, in chunks of one row for each of `rows`."""
    start = np.stack([rows, np.zeros_like(rows)], 1)
    stop = np.stack([rows + 1, np.full_like(rows, width)], 1)
    places = np.arange(5 * len(rows)).reshape(len(rows), 5) * 1000
    places[:, 0] = rows % len(FILES)
    return TensorTable(name, dtype, (len(rows), width), (name,), start, stop, places)


def some_tables() -> list[TensorTable]:
    """Tensors of one, few and many chunks, some of which share their columns with others."""
    made = [
        table(f"w{number}", dtype, np.arange(count), 7)
        for number, (dtype, count) in enumerate(
            [("float32", 9), ("float32", 1), ("float32", 9), ("int64", 9), ("float32", 700)]
        )
    ]
    return made + [made[0]._replace(name=name, path=(name,)) for name in ("a", "b")]


def encoded() -> list[bytes | bytearray]:
    return StockIndex(some_tables(), {"step": ("step",)}, FILES).encode(
        {"step": (FILES[0], Span(5, 100))}
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_lists_of_places_give_the_bytes_of_arrays(count: int) -> None:
    """Method: a tensor without chunks, with one and with three, with its places as an array and as
    lists, in each of the three files."""

    def encoded_with(one: TensorTable) -> list[bytes]:
        rows = tables.encode_rows([one])
        stock = StockIndex([one], {}, FILES).encode({})
        members = tables.encode_tensors([one])
        return [members, rows.tensors, b"".join(rows.parts), b"".join(stock)]

    one = table("w", "float32", np.arange(count), 7)
    assert isinstance(one.places, np.ndarray)
    lists = one._replace(places=one.places.tolist())
    assert encoded_with(lists) == encoded_with(one)


def test_metadata_in_parts_has_the_bytes_of_metadata_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: parts for all tensors of two chunks or more, and for none. Stock torch reads them."""
    monkeypatch.setattr(tables, "_LARGE_CHUNKS_MIN", 2)
    parts = encoded()
    monkeypatch.setattr(tables, "_LARGE_CHUNKS_MIN", 1 << 30)
    whole = encoded()
    assert len(parts) > len(whole)
    assert b"".join(parts) == b"".join(whole)
    (tmp_path / ".metadata").write_bytes(b"".join(parts))
    metadata = FileSystemReader(tmp_path).read_metadata()
    for made in some_tables():
        stored = metadata.state_dict_metadata[made.name]
        assert isinstance(stored, TensorStorageMetadata)
        starts = [tuple(chunk.offsets) for chunk in stored.chunks]
        assert starts == [tuple(start) for start in made.start.tolist()]
        assert stored.properties.dtype == getattr(torch, made.dtype)


def test_equal_columns_are_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: identity of the parts of tensors that share their columns."""
    monkeypatch.setattr(tables, "_LARGE_CHUNKS_MIN", 2)
    parts = encoded()
    assert len({*map(id, parts)}) < len(parts)
