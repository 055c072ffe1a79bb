"""Checks the files of a checkpoint, their sizes and its index. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator

from xxhash import xxh3_64

from holdfast.catalog.findings import Finding
from holdfast.errors import FormatError, HoldfastError, NotFoundError
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import MANIFEST, METADATA
from holdfast.format.region import Region, first_overlap
from holdfast.storage.store import ReadStore

INDEX_BYTES_MAX = 1 << 30
"""Most bytes of an index that is read as a whole: enough for several million tensors."""

_WINDOW_BYTES = 16 << 20
"""Bytes of `.metadata` that are read at once. The whole file may have gigabytes."""


def check_structure(store: ReadStore, folder: str, manifest: Manifest) -> list[Finding]:
    """Find files that are missing, have another size or are links out of the folder, and entries
    that reach beyond the end of their file. Reads `.metadata` and file sizes only."""
    findings = []
    for file, nbytes in manifest.sizes.items():
        try:
            size = store.size(f"{folder}/{file}")
        except NotFoundError:
            findings.append(Finding("file", file, "is missing"))
            continue
        except HoldfastError as error:
            findings.append(Finding("file", file, f"cannot be read: {error.what}"))
            continue
        if store.leads_out(folder, file):
            # A link in a checkpoint from a stranger could load a private file of the user into a
            # model.
            findings.append(Finding("file", file, "is a link to a place outside of its folder"))
        if size != nbytes:
            findings.append(Finding("file", file, f"has {size} bytes, {nbytes} were written"))
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
    """Yield a finding for each tensor whose chunks do not hold every element exactly once."""
    index = MANIFEST if manifest.metadata else METADATA
    for name, entry in manifest.tensors.items():
        if len(entry.chunks) == 1 and entry.chunks[0].region.is_whole(entry.shape):
            continue
        held = sum(chunk.region.num_elements for chunk in entry.chunks)
        expected = Region.whole(entry.shape).num_elements
        if held != expected:
            what = f"its chunks hold {held} of {expected} elements"
            yield Finding("data", index, what, name)
            continue
        try:
            overlap = first_overlap(chunk.region for chunk in entry.chunks)
        except FormatError as error:
            yield Finding("data", index, error.what, name)
            continue
        if overlap:
            what = f"some elements are there twice: {overlap[0]} and {overlap[1]}"
            yield Finding("data", index, what, name)


def items_of(manifest: Manifest) -> Iterator[tuple[str, str, Span]]:
    """For every chunk and value, yield the name of its entry, its file, and its span in the
    file."""
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            yield name, chunk.file, chunk.item
    for name, value in manifest.values.items():
        yield name, value.file, value.item


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
    except NotFoundError:
        return [Finding("index", METADATA, "is missing")]
    except HoldfastError as error:
        return [Finding("index", METADATA, f"cannot be read: {error.what}")]
    if num_read != nbytes or state.intdigest() != expected:
        return [Finding("index", METADATA, f"is not the {nbytes} bytes that were written")]
    return []
