"""Commit: collect the write results of all ranks, and publish the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, gather_and_run
from holdfast.errors import HoldfastError, MismatchError
from holdfast.format.manifest import Manifest
from holdfast.format.names import HiddenFolder
from holdfast.planning.index import Index
from holdfast.planning.shared_files import number_of, shared_index
from holdfast.saving.digests import Digests, groups_that_differ, names_that_differ
from holdfast.saving.publish import publish
from holdfast.saving.write import WriteResult
from holdfast.spelling import listed

T = TypeVar("T")

_LISTED_MAX = 20


def commit(
    attempt: HiddenFolder,
    written: WriteResult | HoldfastError,
    *,
    index: Index | None,
    facts: Manifest,
    digests: Digests,
    catalog: Catalog,
    ranks: Ranks,
) -> tuple[int, int]:
    """Publish the files that all ranks have written. Returns the checkpoint's bytes, and how many
    of them are in linked files.

    `index`: on rank 0 the index of the plan, elsewhere None.
    `facts`: see `publish`.
    `digests`: digests of the tensors whose replicas must not differ.

    Collective: every rank calls this once. A rank that failed to write passes its error in place of
    its result. No rank returns before the checkpoint is published. If a rank failed or replicas
    differ, nothing is published, the attempt is deleted, and every rank raises.
    """

    def publish_on_rank_0(results: Sequence[WriteResult]) -> tuple[int, int]:
        assert index is not None
        in_files = _index_of(index, results)
        nbytes = publish(attempt, results, in_files, facts, catalog)
        files = (file for result in results for file in result.files())
        return nbytes, sum(file.nbytes for file in files if file.num_links)

    try:
        return run_if_alike(written, digests, ranks, publish_on_rank_0)
    except HoldfastError:
        if ranks.rank == 0:
            catalog.abort(attempt)
        raise


def _index_of(index: Index, results: Sequence[WriteResult]) -> Index:
    """Return the index of the files that all ranks have written or linked. This is `index` itself,
    unless ranks share files with earlier checkpoints."""
    places = [result.places for result in results if result.places is not None]
    if not places:
        return index
    assert len(places) == len(results), "all ranks share files, or none"
    return shared_index(
        index,
        [[file.number for file in result.files()] for result in results],
        [number_of(result.file) for result in results],
        places,
    )


def run_if_alike(
    written: WriteResult | HoldfastError,
    digests: Digests,
    ranks: Ranks,
    work: Callable[[Sequence[WriteResult]], T],
) -> T:
    """If no rank failed and no replicas differ, run `work` on rank 0 with the write results of all
    ranks, and return its result on every rank. Otherwise every rank raises. Collective: see
    `commit`."""

    def work_or_differ(
        everyone: Sequence[tuple[WriteResult, dict[int, int]]],
    ) -> tuple[list[int], T | None]:
        differ = groups_that_differ([groups for _, groups in everyone])
        return differ, None if differ else work([result for result, _ in everyone])

    outcome = written if isinstance(written, HoldfastError) else (written, digests.by_group())
    differ, result = gather_and_run(ranks, outcome, work_or_differ)
    if differ:
        gather_and_run(ranks, digests.of(differ), _refuse)
    return cast("T", result)


def _refuse(everyone: Sequence[dict[str, tuple[int, int]]]) -> None:
    """Raise a MismatchError that lists every tensor that differs between ranks."""
    lines = [
        f"`{name}` differs between ranks {first} and {other}"
        for name, (first, other) in names_that_differ(everyone).items()
    ]
    raise MismatchError(
        "ranks that train one model hold different versions of it, nothing was saved:"
        + listed(lines, _LISTED_MAX),
        hint="the ranks have diverged: compare their seeds, data and gradients. State that is "
        "meant to differ needs a name of its own on each rank, such as `states={'rank_3': ...}`",
    )
