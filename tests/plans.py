"""Save tensors by a given global plan, without DTensors; tensors of random bits."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.format.dtypes import BY_NAME
from holdfast.format.manifest import Manifest
from holdfast.format.region import Region
from holdfast.planning.file_layout import lay_out, lay_out_file
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import GlobalPlan, LocalTensor, TensorChunks
from holdfast.saving.commit import commit
from holdfast.saving.digests import Digests
from holdfast.saving.stage import host_windows
from holdfast.saving.write import write
from holdfast.state.layout import box_of
from holdfast.storage.store import Store
from holdfast.testing.ranks import run_ranks


def save_by_plan(
    store: Store,
    name: str,
    plan: GlobalPlan,
    tensors: Mapping[str, torch.Tensor],
    size: int,
    step: int = 1,
) -> None:
    """Save by `size` ranks, each of which writes its part of `plan`.

    Every rank has all tensors. Layout, write and commit are Holdfast's own.
    """
    catalog = Catalog(store)

    def work(ranks: Ranks) -> None:
        attempt = run_on_rank_0(ranks, lambda: catalog.begin(name))
        items = lay_out(
            [
                (placed.name, placed.tensor.dtype, region)
                for placed in plan.tensors
                for region in placed.regions_of(ranks.rank)
            ]
        )
        layouts = ranks.gather(columns(items))
        index = Index(plan, layouts) if ranks.rank == 0 else None
        layout = lay_out_file(ranks.rank, items, [])
        result = write(
            store,
            str(attempt),
            layout,
            lambda item: host_windows(box_of(tensors[item.name], item.region), item.dtype),
        )
        facts = Manifest({}, {}, step=step, kind="full")
        commit(
            attempt,
            result,
            index=index,
            facts=facts,
            digests=Digests(),
            catalog=catalog,
            ranks=ranks,
        )

    run_ranks(size, work)


Held = Mapping[str, tuple[torch.Tensor, list[list[Region]]]]
"""Each whole tensor by name, with the regions that each rank holds."""


def save_regions(store: Store, name: str, held: Held, size: int, step: int = 1) -> None:
    """Save by `size` ranks, each holding its own regions. The last rank that holds a region writes
    it."""
    plan = GlobalPlan([placed(key, *tensor) for key, tensor in held.items()], {}, {})
    save_by_plan(store, name, plan, {key: whole for key, (whole, _) in held.items()}, size, step)


def placed(key: str, whole: torch.Tensor, held: list[list[Region]]) -> TensorChunks:
    """Return the regions of a tensor that the ranks hold, each with the rank that writes it."""
    writers = {region: rank for rank, regions in enumerate(held) for region in regions}
    dims = (len(writers), whole.ndim)
    dtype = str(whole.dtype).removeprefix("torch.")
    return TensorChunks(
        key,
        LocalTensor(dtype, tuple(whole.shape), (key,)),
        np.array([region.start for region in writers], np.int64).reshape(dims),
        np.array([region.stop for region in writers], np.int64).reshape(dims),
        np.array([*writers.values()], np.int64),
    )


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of random bits. Some of its floats are NaN or infinite."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype == "bool" else 256
    nbytes = prod(shape) * BY_NAME[dtype].itemsize
    plain = torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=generator)
    return plain.view(getattr(torch, dtype)).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
