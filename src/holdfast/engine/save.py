"""Save: plan, stage, write, commit."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from holdfast.catalog.catalog import Catalog
from holdfast.engine.background import Snapshot
from holdfast.engine.commit import Facts, commit
from holdfast.engine.plan import Offer, Share, TensorOffer, differing, shares
from holdfast.engine.ranks import Ranks, all_ranks, on_every_rank, on_rank_0, outcome_of
from holdfast.engine.root import open_root
from holdfast.engine.spans import Spans, amount
from holdfast.engine.stage import host_bytes
from holdfast.engine.values import encode_value
from holdfast.engine.write import DataOf, FileImage, lay_out, write
from holdfast.errors import ExistsError, HoldfastError, StorageError
from holdfast.format.checksum import checksum
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Kind, Path
from holdfast.format.names import Aside
from holdfast.format.region import Region
from holdfast.state.layout import Layout, layout_of, same_memory
from holdfast.state.objects import StateTree
from holdfast.state.tree import Leaf

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is published and durable."""

    where: str
    nbytes: int
    spans: Spans


def save(
    path: str | os.PathLike[str], state: Mapping[str, Any], *, overwrite: bool = False
) -> Saved:
    """Save `state` as one checkpoint at `path`, published whole or not at all.

    `state` is a dict of tensors, DTensors, plain values, further dicts and lists of these, and of
    objects with `state_dict` and `load_state_dict`: modules, optimizers (whose entries are named by
    the parameters of the modules beside them), schedulers. Stock `torch.distributed.checkpoint`
    finds the same names.

    Collective where `torch.distributed` is initialized: every rank calls this with its part of the
    state; an error on one is raised on all.

    Raises:
        ExistsError: there is something at `path`, and `overwrite` is false.
        UsageError: a value that could not be read back safely.
        StorageError: no space, no rights; nothing is left behind.
    """
    catalog, name = open_root(path)
    ranks = all_ranks()
    try:
        on_rank_0(ranks, lambda: _check_free(catalog, name, overwrite))
        leaves = on_every_rank(ranks, StateTree(state).leaves)
        return save_leaves(catalog, name, leaves, ranks=ranks, planner=Planner(ranks))
    finally:
        ranks.close()


def _check_free(catalog: Catalog, name: str, overwrite: bool) -> None:
    """Make sure that the folder is there and the name may be taken."""
    catalog.store.make_folder("")
    if not overwrite and {name, f"{name}/"} & set(catalog.store.list()):
        raise ExistsError(
            f"`{catalog.where(name)}` exists already",
            hint="choose another path, or pass `overwrite=True` to replace it",
        )


class Planner:
    """Who writes what, agreed between the ranks once and kept while nobody's layout changes."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._offer: Offer | None = None
        self._share = Share((), ())
        self.offers: list[Offer] = []
        """Of every rank, on rank 0."""

    def nbytes_of(self, wanted: Callable[[Path], bool]) -> int:
        """Bytes, over all ranks, of the tensors whose path is wanted; known to rank 0 alone."""
        tensors = {
            n: t for offer in self.offers for n, t in offer.tensors.items() if wanted(t.path)
        }
        return sum(math.prod(t.shape) * dtype_of(t.dtype).itemsize for t in tensors.values())

    def plan(self, offer: Offer, digests: Callable[[], dict[str, int]]) -> Share:
        """What this rank is to write. `digests` gives one of each value that it holds; values that
        differ between ranks under one name are looked for whenever the layout is new.

        Collective: every rank calls this with what it holds.
        """
        ranks = self._ranks
        changed = ranks.broadcast(any(ranks.gather(offer != self._offer)))
        if changed:
            # Forgotten until all have agreed: a failed plan must not be taken for the next one.
            self._offer = None
            self.offers = ranks.gather(offer)
            planned: list[Share] = []
            on_rank_0(ranks, lambda: planned.extend(shares(self.offers)))
            self._share = ranks.scatter(planned)
            for name in differing(ranks.gather(on_every_rank(ranks, digests))):
                logger.warning(
                    "`%s` differs between ranks: the first rank's is kept. State of one rank alone "
                    "needs a key of its own, such as `rank_3`",
                    name,
                )
            self._offer = offer
        return self._share


@dataclass(slots=True)
class _Held:
    """What this rank holds: tensors by name with how they lie, and values."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    offer: Offer = field(default_factory=Offer)

    def digests(self) -> dict[str, int]:
        """One number a value, equal where the values are."""
        return {n: checksum(encode_value(n, value)) for n, value in self.values.items()}


@dataclass(frozen=True, slots=True)
class Pending:
    """A save that all ranks have agreed on; its attempt folder is there, and empty."""

    catalog: Catalog
    attempt: Aside
    image: FileImage
    data_of: DataOf
    """Reads the training state, until a snapshot takes its place."""

    offers: Sequence[Offer]
    """Of every rank, on rank 0."""

    facts: Facts
    spans: Spans


def save_leaves(
    catalog: Catalog,
    name: str,
    leaves: Mapping[str, Leaf],
    *,
    ranks: Ranks,
    planner: Planner,
    step: int | None = None,
    kind: Kind | None = None,
    dtype: torch.dtype | None = None,
) -> Saved:
    """Save flat state as checkpoint `name` of `catalog`, in place of one that has the name.

    Floating-point tensors are converted to `dtype` where one is given.

    Collective: every rank calls this; an error on one is raised on all, and the catalog is as it
    was before.
    """
    pending = begin_save(
        catalog, name, leaves, ranks=ranks, planner=planner, step=step, kind=kind, dtype=dtype
    )
    return finish_save(pending, ranks)


def begin_save(
    catalog: Catalog,
    name: str,
    leaves: Mapping[str, Leaf],
    *,
    ranks: Ranks,
    planner: Planner,
    step: int | None = None,
    kind: Kind | None = None,
    dtype: torch.dtype | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Pending:
    """Agree on a save: everything of `save_leaves` up to the first byte. Collective.

    `metrics` are kept in the manifest, those of rank 0.
    """
    spans = Spans()
    with spans("plan"):
        held = on_every_rank(ranks, lambda: _hold(leaves, dtype))
        share = planner.plan(held.offer, held.digests)
        image = on_every_rank(ranks, lambda: _image(ranks.rank, share, held))
        totals = ranks.gather(image.nbytes)
        attempt = on_rank_0(ranks, lambda: _begin(catalog, name, sum(totals)))
    facts = Facts(step, kind, {"world_size": ranks.size}, _versions(), metrics or {})
    data_of = partial(_live_data, held, dtype)
    return Pending(catalog, attempt, image, data_of, planner.offers, facts, spans)


def take_snapshot(pending: Pending, snapshot: Snapshot, ranks: Ranks) -> Pending:
    """The same save from a host copy: training may change its state from here on. Collective."""
    with pending.spans("stage"):
        work = partial(snapshot.take, pending.image, pending.data_of)
        try:
            return replace(pending, data_of=on_every_rank(ranks, work))
        except HoldfastError:
            if ranks.rank == 0:
                pending.catalog.discard(pending.attempt)
            raise


def finish_save(pending: Pending, ranks: Ranks) -> Saved:
    """Write and publish. Collective, over ranks that nothing else uses in the meantime."""
    catalog, attempt, spans = pending.catalog, pending.attempt, pending.spans
    with spans("write"):
        written = outcome_of(
            lambda: write(catalog.store, str(attempt), pending.image, pending.data_of)
        )
    with spans("commit"):
        nbytes = commit(
            attempt,
            written,
            offers=pending.offers,
            facts=pending.facts,
            catalog=catalog,
            ranks=ranks,
        )
    return Saved(catalog.where(attempt.name), nbytes, spans)


def _hold(leaves: Mapping[str, Leaf], dtype: torch.dtype | None) -> _Held:
    held = _Held()
    names: dict[tuple[object, ...], str] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf.value, torch.Tensor):
            held.values[name] = leaf.value
            held.offer.values[name] = leaf.path
            continue
        layout = layout_of(name, leaf.value)
        memory = same_memory(leaf.value)
        if memory is not None and names.setdefault(memory, name) != name:
            held.offer.aliases[name] = (names[memory], leaf.path)
            continue
        held.layouts[name] = layout
        stored_as = layout.dtype
        if dtype is not None and layout.local.is_floating_point():
            stored_as = str(dtype).removeprefix("torch.")
        regions = tuple(piece.region for piece in layout.pieces)
        held.offer.tensors[name] = TensorOffer(stored_as, layout.shape, regions, leaf.path)
    return held


def _image(rank: int, share: Share, held: _Held) -> FileImage:
    regions = [(name, held.offer.tensors[name].dtype, region) for name, region in share.regions]
    return lay_out(rank, regions, {n: encode_value(n, held.values[n]) for n in share.values})


def _begin(catalog: Catalog, name: str, nbytes: int) -> Aside:
    free = catalog.store.free_bytes()
    if free is not None and nbytes > free:
        raise StorageError(
            f"`{catalog.where(name)}` needs {amount(nbytes)}, {amount(free)} are free",
            hint="free some space (df -h), lower `checkpoint.keep_latest_k`, or use another disk",
        )
    return catalog.begin(name)


def _live_data(held: _Held, dtype: torch.dtype | None, name: str, region: Region) -> memoryview:
    """Raw bytes of a region, from the tensor that training goes on with."""
    layout = held.layouts[name]
    local = next(piece.local for piece in layout.pieces if piece.region == region)
    return host_bytes(layout.local, local, dtype if layout.local.is_floating_point() else None)


def _versions() -> dict[str, str]:
    return {
        "holdfast": version("holdfast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
