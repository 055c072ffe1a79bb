"""Encode a whole `Manifest`, which a save writes part by part from columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from holdfast.format import checksum
from holdfast.format.manifest import Chunk, Manifest, TensorEntry, encode_around
from holdfast.format.tables import StockIndex, TensorTable, encode_rows, encode_tensors


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`."""
    tensors = encode_tensors(_tables(manifest, list(manifest.files)))
    return b"".join(encode_around(manifest, tensors))


def sealed(body: object, separators: tuple[str, str] | None = None) -> bytes:
    """Add a correct checksum to any body, which is JSON or bytes, as an attacker would."""
    text = body if isinstance(body, bytes) else json.dumps(body, separators=separators).encode()
    seal = checksum.to_hex([checksum.checksum(text)]).encode()
    return text[:-1] + b',"checksum":"' + seal + b'"}'


def encode_with_rows(manifest: Manifest) -> tuple[bytes, bytes]:
    """Return the bytes of `manifest.json` and `index.bin`, with all chunks there."""
    rows = encode_rows(_tables(manifest, list(manifest.files)))
    head = encode_around(replace(manifest, rows=rows.file), rows.tensors)
    return b"".join(head), b"".join(rows.parts)


def encode_metadata(manifest: Manifest) -> bytes:
    """Return the bytes of `.metadata`."""
    files = dict.fromkeys(manifest.files)
    files |= dict.fromkeys(c.file for t in manifest.tensors.values() for c in t.chunks)
    files |= dict.fromkeys(value.file for value in manifest.values.values())
    values = {name: entry.path for name, entry in manifest.values.items()}
    index = StockIndex(_tables(manifest, list(files)), values, list(files))
    return b"".join(index.encode({n: (e.file, e.item) for n, e in manifest.values.items()}))


def _tables(manifest: Manifest, files: list[str]) -> list[TensorTable]:
    number = {file: index for index, file in enumerate(files)}
    tables: list[TensorTable] = []
    chunks: Sequence[Chunk] = ()
    for name, entry in manifest.tensors.items():
        table = _table(name, entry, number)
        if tables and len(entry.chunks) and entry.chunks == chunks:
            table = table._replace(places=tables[-1].places)  # Tied tensors share their rows.
        tables.append(table)
        chunks = entry.chunks
    return tables


def _table(name: str, entry: TensorEntry, number: Mapping[str, int]) -> TensorTable:
    chunks = entry.chunks
    dims = (len(chunks), len(chunks[0].region.start if chunks else entry.shape))
    places = [
        (
            number[chunk.file],
            chunk.item.offset,
            chunk.item.nbytes,
            -1 if chunk.data_offset is None else chunk.data_offset,
            -1 if chunk.first_block is None else chunk.first_block,
        )
        for chunk in chunks
    ]
    return TensorTable(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        path=entry.path,
        start=np.array([chunk.region.start for chunk in chunks], np.int64).reshape(dims),
        stop=np.array([chunk.region.stop for chunk in chunks], np.int64).reshape(dims),
        places=np.array(places, np.int64).reshape(len(chunks), 5),
    )
