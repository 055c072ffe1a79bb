"""From receipts to a published checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, gather_and_run
from holdfast.errors import HoldfastError, MismatchError
from holdfast.format.names import HiddenFolder
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.index import Index
from holdfast.saving.digests import Group, Replicas, groups_that_differ, names_that_differ
from holdfast.saving.publish import Facts, publish
from holdfast.saving.write import WriteResult

_LISTED_MAX = 20


def commit(
    attempt: HiddenFolder,
    written: WriteResult | HoldfastError,
    *,
    index: Index | None,
    facts: Facts,
    replicas: Replicas,
    catalog: Catalog,
    ranks: Ranks,
) -> int:
    """Publish what every rank has written. Returns the checkpoint's bytes.

    Collective: every rank calls this once, also one that failed to write: it passes its error in
    place of its receipt. No rank returns before the checkpoint exists; if it cannot, every rank
    raises, and nothing is left of the attempt. One in which ranks differ in what they should hold
    alike is not published.

    `index` is what the plan decides, on rank 0.
    """

    def finish(everyone: Sequence[tuple[WriteResult, dict[Group, int]]]) -> int | list[Group]:
        differ = groups_that_differ([groups for _, groups in everyone])
        if differ:
            return differ
        results = [result for result, _ in everyone]
        assert index is not None
        # That may have to wait for it, beside training: not with the collector at rest.
        index.encoded()
        with gc_paused():
            return publish(attempt, results, index, facts, catalog)

    mine = written if isinstance(written, HoldfastError) else (written, replicas.by_group())
    try:
        done = gather_and_run(ranks, mine, finish)
        if isinstance(done, list):
            gather_and_run(ranks, replicas.of(done), _refuse)
        assert isinstance(done, int), "refused on every rank"
        return done
    except HoldfastError:
        if ranks.rank == 0:
            _abort(catalog, attempt)
        raise


def _refuse(everyone: Sequence[dict[str, tuple[Group, int]]]) -> None:
    """Raises MismatchError with every tensor of which ranks have different versions."""
    lines = [
        f"`{name}` differs between ranks {one} and {other}"
        for name, (one, other) in names_that_differ(everyone).items()
    ]
    more = len(lines) - _LISTED_MAX
    listed = "\n  ".join(lines[:_LISTED_MAX]) + (f"\n  ... and {more} more" if more > 0 else "")
    raise MismatchError(
        f"ranks that train one model hold different versions of it, nothing was saved:\n  {listed}",
        hint="the ranks have diverged: compare their seeds, data and gradients; what is meant to "
        "differ needs a name of its own on each rank, such as `states={'rank_3': ...}`",
    )


def _abort(catalog: Catalog, attempt: HiddenFolder) -> None:
    # What made the save fail may forbid this too; then the next start sweeps it.
    with suppress(HoldfastError):
        catalog.abort(attempt)
