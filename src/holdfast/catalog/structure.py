"""Checks the files of a checkpoint, their sizes and its indices. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from xxhash import xxh3_64

from holdfast.catalog.findings import Finding, finding_of
from holdfast.errors import DamagedError, FormatError, HoldfastError
from holdfast.format.chunks import ChunkRows, RowFile
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import MANIFEST, METADATA, ROWS
from holdfast.format.region import Region, first_overlap
from holdfast.storage.store import ReadStore

INDEX_BYTES_MAX = 1 << 30
"""Most bytes of an index that is read as a whole: enough for several million tensors."""

_WINDOW_BYTES = 16 << 20
"""Bytes of `.metadata` that are read at once. The whole file may have gigabytes."""


def check_structure(store: ReadStore, folder: str, manifest: Manifest) -> list[Finding]:
    """Find files that are missing, have another size or are links out of the folder, and entries
    that reach beyond the end of their file. Reads `.metadata`, `index.bin` and file sizes only."""
    findings: list[Finding] = []
    for file, nbytes in manifest.sizes.items():
        try:
            size = store.size(f"{folder}/{file}")
        except HoldfastError as error:
            findings.append(finding_of("file", file, error))
            continue
        if store.leads_out(folder, file):
            # A link in a checkpoint from a stranger could load a private file of the user into a
            # model.
            findings.append(Finding("file", file, "is a link to a place outside of its folder"))
        if size != nbytes:
            findings.append(Finding("file", file, f"has {size} bytes, {nbytes} were written"))
    if manifest.rows is not None and not any(finding.file == ROWS for finding in findings):
        findings += _check_rows(manifest.rows)
    # The decoder of Holdfast's own manifest has checked that no item reaches beyond its file. Do
    # not check it again: there may be millions of items.
    for name, file, item in () if manifest.tables else items_of(manifest):
        if file not in manifest.files:
            findings.append(Finding("file", file, "is missing", name))
        elif item.stop > manifest.files[file]:
            what = f"reaches to byte {item.stop} of {manifest.files[file]}"
            findings.append(Finding("file", file, what, name))
    if manifest.metadata:
        findings += _check_metadata(store, folder, *manifest.metadata)
    return findings


def check_coverage(manifest: Manifest) -> Iterator[Finding]:
    """Yield a finding for each tensor whose chunks do not hold every element exactly once, or whose
    rows in `index.bin` a load cannot search."""
    index = MANIFEST if manifest.metadata else METADATA
    for name, entry in manifest.tensors.items():
        # Decode the rows of `index.bin` only once, since there may be millions.
        regions = [chunk.region for chunk in entry.chunks]
        if isinstance(entry.chunks, ChunkRows):
            yield from _check_search(name, entry.chunks, regions)
        if len(regions) == 1 and regions[0].is_whole(entry.shape):
            continue
        held = sum(region.num_elements for region in regions)
        expected = Region.whole(entry.shape).num_elements
        if held != expected:
            what = f"its chunks hold {held} of {expected} elements"
            yield Finding("data", index, what, name)
            continue
        try:
            overlap = first_overlap(regions)
        except FormatError as error:
            yield Finding("data", index, error.what, name)
            continue
        if overlap:
            what = f"some elements are there twice: {overlap[0]} and {overlap[1]}"
            yield Finding("data", index, what, name)


def _check_search(name: str, rows: ChunkRows, regions: Sequence[Region]) -> Iterator[Finding]:
    """Yield a finding if a search in the rows of tensor `name` could miss a chunk: the rows are not
    sorted, or the manifest states a too small length of the longest chunk. `regions`: regions of
    the chunks."""
    for row, (before, after) in enumerate(pairwise(regions), 1):
        if after.start < before.start:
            starts = f"row {row} starts at {list(after.start)}, the row before at"
            what = f"its rows are not sorted: {starts} {list(before.start)}"
            yield Finding("data", ROWS, what, name)
            break
    for dim, stated in enumerate(rows.longest):
        longest = max((region.shape[dim] for region in regions), default=0)
        if longest > stated:
            what = f"its longest chunk along dim {dim} has {longest} elements, `rows` says {stated}"
            yield Finding("data", MANIFEST, what, name)


def items_of(manifest: Manifest) -> Iterator[tuple[str, str, Span]]:
    """For every chunk and value, yield the name of its entry, its file, and its span in the
    file."""
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            yield name, chunk.file, chunk.item
    for name, value in manifest.values.items():
        yield name, value.file, value.item


def _check_rows(rows: RowFile) -> list[Finding]:
    """Compare every block of `index.bin` with its checksum."""
    try:
        rows.check()
    except DamagedError as error:
        return [Finding("index", ROWS, error.what.removeprefix(f"`{rows.where}`: "))]
    except HoldfastError as error:
        return [finding_of("index", ROWS, error)]
    return []


def _check_metadata(store: ReadStore, folder: str, nbytes: int, expected: int) -> list[Finding]:
    state, num_read = xxh3_64(), 0
    try:
        # Read up to one byte more than expected, to notice a file that is too long.
        for start in range(0, nbytes + 1, _WINDOW_BYTES):
            stop = min(start + _WINDOW_BYTES, nbytes + 1)
            data = store.read(f"{folder}/{METADATA}", start, stop)
            state.update(data)
            num_read += len(data)
            if len(data) < stop - start:
                break
    except HoldfastError as error:
        return [finding_of("index", METADATA, error)]
    if num_read != nbytes or state.intdigest() != expected:
        return [Finding("index", METADATA, f"is not the {nbytes} bytes that were written")]
    return []
