"""Publish an attempt: write both indices, and rename the folder to the checkpoint's name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.errors import HoldfastError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import checksum_of_parts
from holdfast.format.manifest import Manifest, ValueEntry, kind_with
from holdfast.format.names import MANIFEST, METADATA, HiddenFolder
from holdfast.format.timings import over_ranks
from holdfast.planning.index import Index
from holdfast.saving.write import WriteResult
from holdfast.storage.store import Store

logger: logging.Logger = logging.getLogger("holdfast")


def publish(
    attempt: HiddenFolder,
    results: Sequence[WriteResult],
    index: Index,
    facts: Manifest,
    catalog: Catalog,
) -> int:
    """Publish the files of all ranks. Returns the checkpoint's bytes.

    `results`: one per rank.
    `facts`: manifest without entries and files. A kind of None is derived from the tensors' names.

    Raises:
        StorageError: rank 0 does not see another rank's file, or an index cannot be written.
    """
    folder, store = str(attempt), catalog.store
    encoded = index.encoded()
    writing = [result for result in results if result.file]
    files = [file for result in results for file in result.files()]
    # Without its tensors, which `encoded` has.
    manifest = replace(
        facts,
        values={
            name: ValueEntry(result.file, item, checksum, index.plan.values[name][1])
            for result in writing
            for name, (item, checksum) in result.values.items()
        },
        files={file.name: file.nbytes for file in files},
        tables={file.name: file.table for file in files},
        shared={file.name: file.num_links for file in files if file.num_links}
        if any(result.places is not None for result in results)
        else None,
        kind=facts.kind or kind_with(encoded.nbytes),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        timings=over_ranks([result.seconds for result in results]),
        structure=index.plan.structure,
    )
    for file, nbytes in manifest.files.items():
        _check_shared(store, folder, file, nbytes)
    metadata = encoded.stock.encode({n: (e.file, e.item) for n, e in manifest.values.items()})
    size_and_checksum = (sum(map(len, metadata)), checksum_of_parts(metadata))
    manifest = replace(manifest, metadata=size_and_checksum)
    for name, parts in (
        (METADATA, metadata),
        (MANIFEST, manifests.encode_around(manifest, encoded.tensors)),
    ):
        with store.create(f"{folder}/{name}", sum(map(len, parts))) as writer:
            writer.write(0, parts)
    catalog.publish(attempt)
    for problem in execute(store, plan_cleanup(store.list(), only=attempt.name)):
        logger.warning("%s; the next save tries again", problem)
    return manifest.nbytes


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
