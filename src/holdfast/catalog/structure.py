"""Checks the files of a checkpoint, their sizes and its index. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.catalog.findings import Finding
from holdfast.errors import FormatError, HoldfastError, NotFoundError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import MANIFEST, METADATA
from holdfast.format.region import Region, first_overlap
from holdfast.storage.store import ReadStore

INDEX_BYTES_MAX = 1 << 30
"""Most bytes of a manifest or `.metadata`: enough for several million tensors."""


def check_structure(store: ReadStore, folder: str, manifest: Manifest) -> list[Finding]:
    """Find files that are missing, of another size or outside of the folder, and entries that reach
    beyond the end of their file. Reads `.metadata` and file sizes only."""
    findings = []
    for file, nbytes in manifest.files.items():
        try:
            size = store.size(f"{folder}/{file}")
        except NotFoundError:
            findings.append(Finding("file", file, "is missing"))
            continue
        except HoldfastError as error:
            findings.append(Finding("file", file, f"cannot be read: {error.what}"))
            continue
        if store.leads_out(folder, file):
            # A stranger's checkpoint could load private files of its reader into a model.
            findings.append(Finding("file", file, "is a link to a place outside of its folder"))
        if size != nbytes:
            findings.append(Finding("file", file, f"has {size} bytes, {nbytes} were written"))
    for name, file, item in items_of(manifest):
        if file not in manifest.files:
            findings.append(Finding("file", file, "is missing", name))
        elif item.stop > manifest.files[file]:
            what = f"reaches to byte {item.stop} of {manifest.files[file]}"
            findings.append(Finding("file", file, what, name))
    if manifest.metadata:
        findings += _check_metadata(store, folder, *manifest.metadata)
    return findings


def check_coverage(manifest: Manifest) -> Iterator[Finding]:
    """Find tensors whose chunks do not hold each element exactly once."""
    index = MANIFEST if manifest.metadata else METADATA
    for name, entry in manifest.tensors.items():
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
    """Yield name, file and span of every chunk and value."""
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            yield name, chunk.file, chunk.item
    for name, value in manifest.values.items():
        yield name, value.file, value.item


def _check_metadata(store: ReadStore, folder: str, nbytes: int, expected: int) -> list[Finding]:
    try:
        # One byte more than expected shows that the file is too long.
        data = store.read(f"{folder}/{METADATA}", 0, min(nbytes, INDEX_BYTES_MAX) + 1)
    except NotFoundError:
        return [Finding("index", METADATA, "is missing")]
    except HoldfastError as error:
        return [Finding("index", METADATA, f"cannot be read: {error.what}")]
    if len(data) != nbytes or checksum(data) != expected:
        return [Finding("index", METADATA, f"is not the {nbytes} bytes that were written")]
    return []
