"""Publish an attempt: write both indices, and rename the folder to the checkpoint's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from holdfast.catalog.catalog import Catalog
from holdfast.errors import HoldfastError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import checksum_of_parts
from holdfast.format.manifest import Manifest, ValueEntry, kind_with
from holdfast.format.names import MANIFEST, METADATA, ROWS, HiddenFolder
from holdfast.format.timings import over_ranks
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.index import Encoded, Index
from holdfast.saving.write import WriteResult
from holdfast.storage.store import Buffer, Store


def publish(
    attempt: HiddenFolder,
    results: Sequence[WriteResult],
    index: Index,
    facts: Manifest,
    catalog: Catalog,
) -> int:
    """Publish the files of all ranks. Returns the checkpoint's bytes.

    `results`: write results, one per rank.
    `facts`: manifest without entries and files. If its kind is None, the top-level names of
        the state decide whether it is a full checkpoint.

    Raises:
        StorageError: rank 0 does not see another rank's file, or an index cannot be written.
    """
    for result in results:
        for file in result.files():
            _check_shared(catalog.store, str(attempt), file.name, file.nbytes)
    files, nbytes = index_files(results, index, facts)
    write_index(attempt, files, catalog.store)
    catalog.publish(attempt)
    catalog.clean_up(attempt.name)
    return nbytes


def index_files(
    results: Sequence[WriteResult], index: Index, facts: Manifest
) -> tuple[dict[str, Sequence[Buffer]], int]:
    """Return the content of each index file, keyed by name in the order of writing, and the
    checkpoint's bytes. For the arguments see `publish`."""
    # Encode before garbage collection is paused: encoding may take minutes, and training, which
    # runs meanwhile, needs it.
    encoded = index.encoded()
    with gc_paused():
        return _index_files(results, index, encoded, facts)


def _index_files(
    results: Sequence[WriteResult], index: Index, encoded: Encoded, facts: Manifest
) -> tuple[dict[str, Sequence[Buffer]], int]:
    writing = [result for result in results if result.file]
    data = [file for result in results for file in result.files()]
    # Leave out the tensors, since `encoded` has them.
    manifest = replace(
        facts,
        values={
            name: ValueEntry(result.file, item, checksum, index.plan.values[name][1])
            for result in writing
            for name, (item, checksum) in result.values.items()
        },
        files={file.name: file.nbytes for file in data},
        tables={file.name: file.table for file in data},
        shared={file.name: file.num_links for file in data if file.num_links}
        if any(result.places is not None for result in results)
        else None,
        kind=facts.kind or kind_with(index.top_names),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        timings=over_ranks([result.seconds for result in results]),
        structure=index.plan.structure,
    )
    metadata = encoded.stock.encode({n: (e.file, e.item) for n, e in manifest.values.items()})
    size_and_checksum = (sum(map(len, metadata)), checksum_of_parts(metadata))
    rows = encoded.rows
    manifest = replace(manifest, metadata=size_and_checksum, rows=rows.file if rows else None)
    parts = manifests.encode_around(manifest, encoded.tensors)
    # `write_index` keeps the order: the manifest comes last.
    files: dict[str, Sequence[Buffer]] = {
        METADATA: metadata,
        **({ROWS: rows.parts} if rows else {}),
        MANIFEST: parts,
    }
    return files, manifest.nbytes


def write_index(attempt: HiddenFolder, files: Mapping[str, Sequence[Buffer]], store: Store) -> None:
    """Write the index files into an attempt."""
    for name, parts in files.items():
        with store.create(f"{attempt}/{name}", sum(map(len, parts))) as writer:
            writer.write(0, parts)


def _check_shared(store: Store, folder: str, file: str, nbytes: int) -> None:
    try:
        visible = store.size(f"{folder}/{file}")
    except HoldfastError as error:
        raise StorageError(
            f"`{file}` was written by its rank, but rank 0 does not see it in `{store.url}`",
            hint="save to a folder that all hosts share: a network file system or an object store",
        ) from error
    if visible != nbytes:
        raise StorageError(f"`{file}`: {nbytes} bytes were written, rank 0 sees {visible}")
