"""Is a checkpoint as it was published? Its structure; its bytes are checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.errors import NotFoundError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import METADATA
from holdfast.storage.store import ReadStore


def check_structure(store: ReadStore, folder: str, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files, one line each: missing, too short, too long, items
    that reach outside of them. Reads `.metadata` and sizes only."""
    problems = []
    for file, nbytes in manifest.files.items():
        try:
            found = store.size(f"{folder}/{file}")
        except NotFoundError:
            problems.append(f"`{file}` is missing")
            continue
        if found != nbytes:
            problems.append(f"`{file}` has {found} bytes, {nbytes} were written")
    for name, file, item in _items(manifest):
        if file not in manifest.files:
            problems.append(f"`{file}` is missing: it holds `{name}`")
        elif item.stop > manifest.files[file]:
            problems.append(
                f"`{file}` ends at byte {manifest.files[file]}, `{name}` reaches to {item.stop}"
            )
    if manifest.metadata:
        problems += _check_metadata(store, folder, *manifest.metadata)
    return problems


def _items(manifest: Manifest) -> Iterator[tuple[str, str, Span]]:
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            yield name, chunk.file, chunk.item
    for name, value in manifest.values.items():
        yield name, value.file, value.item


def _check_metadata(store: ReadStore, folder: str, nbytes: int, expected: int) -> list[str]:
    try:
        data = store.read(f"{folder}/{METADATA}", 0, nbytes + 1)
    except NotFoundError:
        return [f"`{METADATA}` is missing"]
    if len(data) != nbytes or checksum(data) != expected:
        return [f"`{METADATA}` is not the {nbytes} bytes that were written"]
    return []
