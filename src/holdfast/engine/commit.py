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
from holdfast.engine.plan import Offer
from holdfast.engine.ranks import Ranks, agree, on_rank_0
from holdfast.engine.write import Receipt
from holdfast.errors import HoldfastError, StorageError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import checksum
from holdfast.format.dcp import encode_metadata
from holdfast.format.manifest import Chunk, Kind, Manifest, TensorEntry, ValueEntry
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
    offers: Sequence[Offer],
    facts: Facts,
    catalog: Catalog,
    ranks: Ranks,
) -> int:
    """Publish what every rank has written. Returns the checkpoint's bytes.

    Collective: every rank calls this once, also one that failed to write: it passes its error in
    place of its receipt. No rank returns before the checkpoint exists; if it cannot, every rank
    raises, and nothing is left of the attempt.

    `offers` are those of all ranks, on rank 0.
    """
    receipts = ranks.gather(written if isinstance(written, Receipt) else None)
    try:
        agree(ranks, written if isinstance(written, HoldfastError) else None)
        return on_rank_0(ranks, lambda: _publish(attempt, receipts, offers, facts, catalog))
    except HoldfastError:
        if ranks.rank == 0:
            _discard(catalog, attempt)
        raise


def _publish(
    attempt: Aside,
    receipts: Sequence[Receipt | None],
    offers: Sequence[Offer],
    facts: Facts,
    catalog: Catalog,
) -> int:
    folder, store = str(attempt), catalog.store
    manifest = _manifest([r for r in receipts if r is not None], offers, facts)
    for file, nbytes in manifest.files.items():
        _check_shared(store, folder, file, nbytes)
    metadata = encode_metadata(manifest)
    manifest = replace(manifest, metadata=(len(metadata), checksum(metadata)))
    for name, data in ((METADATA, metadata), (MANIFEST, manifests.encode(manifest))):
        with store.create(f"{folder}/{name}", len(data)) as writer:
            writer.write(0, [data])
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


def _manifest(receipts: Sequence[Receipt], offers: Sequence[Offer], facts: Facts) -> Manifest:
    chunks: dict[str, list[Chunk]] = {}
    values: dict[str, ValueEntry] = {}
    files: dict[str, int] = {}
    offered = {name: path for offer in reversed(offers) for name, path in offer.values.items()}
    for receipt in receipts:
        if receipt.file:
            files[receipt.file] = receipt.nbytes
        for name, chunk in receipt.chunks:
            chunks.setdefault(name, []).append(chunk)
        for name, (item, found) in receipt.values.items():
            values[name] = ValueEntry(receipt.file, item, found, offered[name])
    tensors: dict[str, TensorEntry] = {}
    for offer in offers:
        for name, tensor in offer.tensors.items():
            if name in chunks and name not in tensors:
                whole = sorted(chunks[name], key=lambda chunk: chunk.region.start)
                tensors[name] = TensorEntry(tensor.dtype, tensor.shape, tuple(whole), tensor.path)
        for name, (first, path) in offer.aliases.items():
            tensors[name] = replace(tensors[first], path=path)
    return Manifest(
        tensors=tensors,
        values=values,
        files=files,
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
