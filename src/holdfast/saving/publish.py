"""From what was written to a published checkpoint: its two indices, and its name."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.errors import HoldfastError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import Running
from holdfast.format.manifest import Kind, Manifest, ValueEntry, kind_with
from holdfast.format.names import MANIFEST, METADATA, Aside
from holdfast.format.timings import over_ranks
from holdfast.planning.index import Index
from holdfast.planning.write_plan import GlobalPlan
from holdfast.saving.write import WriteResult
from holdfast.storage.store import Store

logger: logging.Logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the manifest says of the checkpoint as a whole."""

    step: int | None
    kind: Kind | None
    """None: what the names of the tensors tell."""

    layout: dict[str, Any]
    versions: dict[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    components: Collection[str] | None = None
    """Top-level names that are not the model's; None where nobody knows."""


def publish(
    attempt: Aside,
    results: Sequence[WriteResult],
    index: Index,
    facts: Facts,
    catalog: Catalog,
) -> int:
    """Publish what the receipts tell of, one of each rank. Returns the checkpoint's bytes.

    Raises:
        StorageError: a file is not where all ranks can see it, or cannot be written.
    """
    folder, store = str(attempt), catalog.store
    made = index.encoded()
    kind = facts.kind or kind_with(made.nbytes)
    manifest = _manifest(results, index.plan, replace(facts, kind=kind))
    for file, nbytes in manifest.files.items():
        _check_shared(store, folder, file, nbytes)
    metadata = made.stock.encode({n: (e.file, e.item) for n, e in manifest.values.items()})
    running = Running()
    for part in metadata:
        running.add(part)
    manifest = replace(manifest, metadata=(sum(map(len, metadata)), running.value))
    encoded = manifests.encode_around(manifest, made.tensors)
    for name, parts in ((METADATA, metadata), (MANIFEST, encoded)):
        with store.create(f"{folder}/{name}", sum(map(len, parts))) as writer:
            writer.write(0, parts)
    catalog.publish(attempt)
    for problem in execute(store, plan_cleanup(store.list(), only=attempt.name)):
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


def _manifest(results: Sequence[WriteResult], plan: GlobalPlan, facts: Facts) -> Manifest:
    """All but the tensors, which the index has as bytes."""
    paths, files = plan.values, [result for result in results if result.file]
    return Manifest(
        tensors={},
        values={
            name: ValueEntry(result.file, item, found, paths[name][1])
            for result in files
            for name, (item, found) in result.values.items()
        },
        files={result.file: result.nbytes for result in files},
        tables={result.file: result.table for result in files},
        step=facts.step,
        kind=facts.kind,
        components=None if facts.components is None else tuple(sorted(facts.components)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        layout=facts.layout,
        versions=facts.versions,
        metrics=facts.metrics,
        model=facts.model,
        timings=over_ranks([result.seconds for result in results]),
        structure=plan.structure,
    )
