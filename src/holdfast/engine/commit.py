"""From receipts to a published checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.sweep import execute, plan_sweep
from holdfast.engine.planner import Index
from holdfast.engine.ranks import Ranks, conclude
from holdfast.engine.write import Receipt
from holdfast.errors import HoldfastError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import Running
from holdfast.format.manifest import Kind, Manifest, ValueEntry
from holdfast.format.names import MANIFEST, METADATA, Aside
from holdfast.storage.store import Store

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the manifest says of the checkpoint as a whole."""

    step: int | None
    kind: Kind | None
    layout: dict[str, Any]
    versions: dict[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)


def commit(
    attempt: Aside,
    written: Receipt | HoldfastError,
    *,
    index: Index | None,
    facts: Facts,
    catalog: Catalog,
    ranks: Ranks,
) -> int:
    """Publish what every rank has written. Returns the checkpoint's bytes.

    Collective: every rank calls this once, also one that failed to write: it passes its error in
    place of its receipt. No rank returns before the checkpoint exists; if it cannot, every rank
    raises, and nothing is left of the attempt.

    `index` is what the plan decides, on rank 0.
    """

    def publish(receipts: Sequence[Receipt]) -> int:
        assert index is not None
        return _publish(attempt, receipts, index, facts, catalog)

    try:
        return conclude(ranks, written, publish)
    except HoldfastError:
        if ranks.rank == 0:
            _discard(catalog, attempt)
        raise


def _publish(
    attempt: Aside,
    receipts: Sequence[Receipt],
    index: Index,
    facts: Facts,
    catalog: Catalog,
) -> int:
    folder, store = str(attempt), catalog.store
    manifest = _manifest([r for r in receipts if r.file], index, facts)
    for file, nbytes in manifest.files.items():
        _check_shared(store, folder, file, nbytes)
    metadata = index.stock.encode({n: (e.file, e.item) for n, e in manifest.values.items()})
    running = Running()
    for part in metadata:
        running.add(part)
    manifest = replace(manifest, metadata=(sum(map(len, metadata)), running.value))
    encoded = manifests.encode_around(manifest, index.tensors)
    for name, parts in ((METADATA, metadata), (MANIFEST, encoded)):
        with store.create(f"{folder}/{name}", sum(map(len, parts))) as writer:
            writer.write(0, parts)
    catalog.publish(attempt)
    for problem in execute(store, plan_sweep(store.list(), only=attempt.name)):
        logger.warning("%s; the next save tries again", problem)
    return manifest.nbytes


def _check_shared(store: Store, folder: str, file: str, nbytes: int) -> None:
    try:
        found = store.size(f"{folder}/{file}")
    except HoldfastError as error:
        raise StorageError(
            f"`{file}` was written by its rank, but rank 0 does not see it in `{store.url}`",
            hint="the folder must be one that all hosts share: a network file system or a store",
        ) from error
    if found != nbytes:
        raise StorageError(f"`{file}`: {nbytes} bytes were written, rank 0 sees {found}")


def _manifest(receipts: Sequence[Receipt], index: Index, facts: Facts) -> Manifest:
    """All but the tensors, which the index has as bytes."""
    paths = index.plan.values
    return Manifest(
        tensors={},
        values={
            name: ValueEntry(receipt.file, item, found, paths[name][1])
            for receipt in receipts
            for name, (item, found) in receipt.values.items()
        },
        files={receipt.file: receipt.nbytes for receipt in receipts},
        tables={receipt.file: receipt.table for receipt in receipts},
        step=facts.step,
        kind=facts.kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        layout=facts.layout,
        versions=facts.versions,
        metrics=facts.metrics,
    )


def _discard(catalog: Catalog, attempt: Aside) -> None:
    # What made the save fail may forbid this too; then the next start sweeps it.
    with suppress(HoldfastError):
        catalog.discard(attempt)
