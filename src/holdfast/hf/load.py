"""A Hugging Face folder into a live model: each rank reads the ranges that it holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from holdfast.catalog.hf_folder import CONFIG, HFFolder, open_hf_folder
from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, run_on_all, run_on_rank_0
from holdfast.errors import UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.hf.check import check_fit
from holdfast.hf.dialects import balances, dialect_of, is_balance, renamed
from holdfast.hf.families import family_of
from holdfast.hf.family import Config, fused_experts, mapping_of
from holdfast.loading.load import Loaded, load_tree
from holdfast.loading.read import THREADS_MAX, Wanted
from holdfast.state.objects import StateTree
from holdfast.storage.store import ReadStore
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import Joined, Mapped, Renamed, Tensors, Zeros
from holdfast.tensors.quantized import Dequantized
from holdfast.tensors.stored import StoredTensors

BLOCK_BYTES = 8 << 20
"""Held beside the model, a thread."""


def load_folder(
    path: str,
    tree: StateTree,
    *,
    ranks: Ranks,
    config: Config | None = None,
    partial_load: bool = False,
) -> tuple[Loaded, tuple[str, ...]]:
    """Load the weights of a Hugging Face folder into the model in `tree`. Returns notes too.

    `config` stands in where the folder has no `config.json`; `partial_load` is that of `load_tree`.
    Quantized weights are dequantized;
    names are Meta's or TorchTitan's, as the model's are.

    Collective: every rank calls this; nothing is sent but headers, and an error on one is raised on
    all.

    Raises:
        MismatchError: the folder holds another model; nothing was changed. Or a number is too large
            for a smaller float: the state is loaded in part.
    """
    store, name = open_for_reading(path)
    folder = run_on_rank_0(ranks, lambda: _opened(store, name))
    source = Source(store, name, folder.manifest)
    leaves = run_on_all(ranks, lambda: tree.flatten().leaves)
    balanced = any(map(is_balance, leaves))
    told = ranks.all_reduce_max([float(dialect_of([*leaves]) == "titan"), float(balanced)])
    titan, balanced = told[0] > 0, told[1] > 0
    notes = run_on_rank_0(ranks, lambda: _checked(source, folder, config))
    tensors = run_on_all(
        ranks, lambda: _native(source, folder, config, titan=titan, balanced=balanced)
    )
    entries = {
        n: TensorEntry(held.stored, held.shape, (), (n,)) for n, held in tensors.held.items()
    }
    seen = Source(store, name, Manifest(entries, {}, kind="model"))
    fill = partial(_fill, tensors)
    loaded = load_tree(seen, tree, ranks=ranks, partial=partial_load, fill=fill)
    return loaded, (*folder.notes, *notes)


def _opened(store: ReadStore, name: str) -> HFFolder:
    check_folder(store, name)
    return open_hf_folder(store, name)


def _config(source: Source, folder: HFFolder, config: Config | None) -> tuple[Config, str]:
    if folder.adapter is not None:
        raise UsageError(
            f"`{source.url}` holds an adapter of PEFT's, a base model is expected here",
            hint=f"its base is `{folder.adapter.get('base_model_name_or_path')}`",
        )
    if folder.config is not None:
        return folder.config, f"`{source.url}/{CONFIG}`"
    if config is None:
        raise UsageError(
            f"`{source.url}` has no `{CONFIG}`, which says how large its model is",
            hint="put the one that belongs to these weights beside them",
        )
    return config, "the configuration of this run"


def _checked(source: Source, folder: HFFolder, config: Config | None) -> list[str]:
    found, said_by = _config(source, folder, config)
    held = Dequantized(StoredTensors(source, {}), folder.quantization)
    family = family_of(found, where=said_by)
    mapping = mapping_of(family, found, fused_experts=fused_experts(family, found, held.held))
    notes = check_fit(held, mapping, "hub", where=source.url, said_by=said_by)
    if held.num_quantized:
        notes.append(f"{held.num_quantized} quantized tensors are dequantized")
    return notes


def _native(
    source: Source, folder: HFFolder, config: Config | None, *, titan: bool, balanced: bool
) -> Tensors:
    """`balanced`: the model has a bias beside every router, which starts from zero."""
    found, said_by = _config(source, folder, config)
    held = Dequantized(StoredTensors(source, {}), folder.quantization)
    family = family_of(found, where=said_by)
    mapping = mapping_of(family, found, fused_experts=fused_experts(family, found, held.held))
    seen: Tensors = Mapped(held, mapping, "native")
    if balanced:
        shapes = {name: held.shape for name, held in seen.held.items()}
        seen = Joined(seen, Zeros(balances(shapes)))
    names = [*seen.held]
    called = renamed([*names, *mapping.aliases["native"]], "titan" if titan else "meta")
    firsts = {called[n]: called[first] for n, first in mapping.aliases["native"].items()}
    return Renamed(seen, {n: called[n] for n in names}, firsts)


def _fill(tensors: Tensors, _: Source, wanted: Sequence[Wanted]) -> int:
    """Fill every wanted tensor. Returns the bytes of what was read."""
    jobs = [
        partial(_fill_block, tensors, want, want_region, into)
        for want in wanted
        for piece in want.pieces
        for want_region, into in _blocks(tensors, want.name, piece.region, piece.local)
    ]
    with ThreadPoolExecutor(min(THREADS_MAX, os.cpu_count() or 1)) as pool:
        return sum(pool.map(lambda job: job(), jobs))


def _blocks(
    tensors: Tensors, name: str, region: Region, local: Region
) -> list[tuple[Region, Region]]:
    """A piece in blocks: where each lies in the whole tensor, and in the rank's own."""
    itemsize = 4 if tensors.held[name].kept else 8
    return [
        (_moved(block, region.start), _moved(block, local.start))
        for block in blocks(region.shape, itemsize, BLOCK_BYTES)
    ]


def _moved(region: Region, by: tuple[int, ...]) -> Region:
    return Region(
        tuple(map(int.__add__, region.start, by)), tuple(map(int.__add__, region.stop, by))
    )


def _fill_block(tensors: Tensors, want: Wanted, region: Region, into: Region) -> int:
    found = np.ascontiguousarray(tensors.read(want.name, region)).reshape(region.shape)
    dtype: torch.dtype = getattr(torch, tensors.held[want.name].dtype)
    target = want.local[into.slices()] if want.local.ndim else want.local
    target.copy_(torch.from_numpy(found).view(dtype))
    return found.nbytes
