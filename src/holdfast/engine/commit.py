"""From receipts to a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from holdfast.catalog.catalog import Catalog
from holdfast.engine.collector import collector_at_rest
from holdfast.engine.index import Index
from holdfast.engine.publish import Facts, publish
from holdfast.engine.ranks import Ranks, conclude
from holdfast.engine.write import Receipt
from holdfast.errors import HoldfastError
from holdfast.format.names import Aside


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

    def finish(receipts: Sequence[Receipt]) -> int:
        assert index is not None
        # That may have to wait for it, beside training: not with the collector at rest.
        index.encoded()
        with collector_at_rest():
            return publish(attempt, receipts, index, facts, catalog)

    try:
        return conclude(ranks, written, finish)
    except HoldfastError:
        if ranks.rank == 0:
            _discard(catalog, attempt)
        raise


def _discard(catalog: Catalog, attempt: Aside) -> None:
    # What made the save fail may forbid this too; then the next start sweeps it.
    with suppress(HoldfastError):
        catalog.discard(attempt)
