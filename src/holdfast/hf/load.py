"""Loading of a Hugging Face folder into a live model: each rank reads its own elements."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations

import numpy as np
import torch

from holdfast.catalog.catalog import location
from holdfast.catalog.findings import FORMATS
from holdfast.catalog.hf_folder import CONFIG, HFFolder, open_hf_folder
from holdfast.catalog.open_any import check_folder, format_of
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, run_on_all, run_on_rank_0
from holdfast.errors import UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.hf.check import HINT, check_fit
from holdfast.hf.dialects import balances, dialect_of, is_balance, renamed
from holdfast.hf.families import family_of, table_of
from holdfast.hf.family import Config, mapping_for
from holdfast.hf.own_names import keeps_names, tensors_for
from holdfast.loading.load import Loaded, load_tree
from holdfast.loading.read import THREADS_MAX, Wanted
from holdfast.state.layout import box_of, elements_of
from holdfast.state.objects import StateTree
from holdfast.state.shard import Piece
from holdfast.state.tree import Leaf
from holdfast.storage.store import ReadStore
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import Joined, Mapped, Renamed, Tensors, Zeros
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.quantized import Dequantized
from holdfast.tensors.renames import spelled, suggested
from holdfast.tensors.stored import StoredTensors

BLOCK_BYTES = 8 << 20
"""Bytes that each thread converts at a time, in memory besides the model."""


def load_folder(
    path: str,
    tree: StateTree,
    *,
    ranks: Ranks,
    config: Config | None = None,
    partial_load: bool = False,
    check_config: Callable[[Config, str], None] = lambda _, __: None,
) -> tuple[Loaded, tuple[str, ...]]:
    """Load the weights of a Hugging Face folder into the model in `tree`. Returns the result, and
    notes for the user.

    `config`: used if the folder has no `config.json`. `partial_load`: whether tensors that are
    missing or do not fit stay as they are, and are reported. `check_config`: called with the
    folder's `config.json`, if there is one, and the path of the folder; an error that it raises
    ends the load. Quantized weights are dequantized. The model may have Meta's, TorchTitan's or
    Hugging Face's names, or any other names if the folder has the same ones.

    Collective: every rank calls this. Ranks exchange only headers; an error on one rank is raised
    on all.

    Raises:
        MismatchError: the weights are of another model, and nothing was changed; or a number is too
            large for the dtype of the model, and the state is loaded in part.
    """
    store, name = open_for_reading(path)
    folder = run_on_rank_0(ranks, lambda: _opened(store, name))
    source = Source(store, name, folder.manifest)
    leaves = run_on_all(ranks, lambda: tree.flatten().leaves)
    if folder.config is not None:
        check_config(folder.config, source.url)
    config = folder.config or config
    # Ranks may have different leaves, as in a pipeline, but must all make the same choices below.
    own_names, titan, has_balance = _agreed(
        ranks,
        keeps_names(leaves, config),
        dialect_of(leaves) == "titan",
        any(map(is_balance, leaves)),
    )
    hf_tensors = run_on_all(ranks, lambda: _open(source, folder))
    notes: Sequence[str] = ()
    if not own_names or (config is not None and table_of(config) is not None):
        mapping, config_from = run_on_all(ranks, lambda: _table(source, folder, config, hf_tensors))
        notes = run_on_rank_0(
            ranks,
            lambda: check_fit(
                hf_tensors,
                mapping,
                "hf",
                where=source.url,
                config_from=config_from,
                hint=_fit_hint(source, hf_tensors, mapping),
            ),
        )
    if own_names:
        tensors = tensors_for(hf_tensors, leaves, _tied(leaves), config)
    else:
        tensors = _native(hf_tensors, mapping, titan=titan, has_balance=has_balance)
    entries = {
        name: TensorEntry(info.write_dtype, info.shape, (), (name,))
        for name, info in tensors.infos.items()
    }
    native = Source(store, name, Manifest(entries, {}, kind="model"))
    fill = partial(_fill, tensors)
    loaded = load_tree(native, tree, ranks=ranks, partial=partial_load, fill=fill)
    return loaded, (*folder.notes, *notes, *hf_tensors.notes)


def _fit_hint(source: Source, tensors: Tensors, mapping: TensorMapping) -> str:
    """Return the hint for tensors that do not fit: if renaming helps, the command that renames
    them."""
    rules = spelled(suggested(tensors.infos, mapping.names("hf")))
    if not rules:
        return HINT
    return f"holdfast convert {source.url} RENAMED --to hf {rules}"


def _opened(store: ReadStore, name: str) -> HFFolder:
    check_folder(store, name)
    form = format_of(store, name)
    if form in ("holdfast", "dcp"):
        raise UsageError(
            f"`{location(store, name)}` is a {FORMATS[form]}, expected: a Hugging Face folder",
            hint="leave out `initial_load_in_hf`; `initial_load_path` takes a checkpoint too",
        )
    return open_hf_folder(store, name)


def _open(source: Source, folder: HFFolder) -> Dequantized:
    if folder.adapter is not None:
        raise UsageError(
            f"`{source.url}` is a PEFT adapter, expected: a base model",
            hint=f"its base is `{folder.adapter.get('base_model_name_or_path')}`",
        )
    return Dequantized(StoredTensors(source, folder.strides), folder.quantization)


def _table(
    source: Source, folder: HFFolder, config: Config | None, tensors: Tensors
) -> tuple[TensorMapping, str]:
    """Return the mapping between native tensors and the folder's, and the origin of the
    configuration, for messages."""
    if config is None:
        raise UsageError(
            f"`{source.url}` has no `{CONFIG}`, which has the sizes of the model",
            hint=f"put the `{CONFIG}` of these weights into the folder",
        )
    config_from = "the configuration of this run"
    if folder.config is not None:
        config_from = f"`{source.url}/{CONFIG}`"
    family = family_of(config, where=config_from)
    return mapping_for(family, config, tensors.infos), config_from


def _agreed(ranks: Ranks, *flags: bool) -> list[bool]:
    """Return, for each flag, whether it is set on any rank. Collective."""
    return [flag > 0 for flag in ranks.all_reduce_max([float(flag) for flag in flags])]


def _tied(leaves: Mapping[str, Leaf]) -> list[tuple[str, str]]:
    """Return every ordered pair of names that share one tensor."""
    names: dict[object, list[str]] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf.value, torch.Tensor) and leaf.value.device.type != "meta":
            elements = elements_of(leaf.value)
            if elements:
                names.setdefault(elements, []).append(name)
    return [pair for group in names.values() for pair in permutations(group, 2)]


def _native(
    hf_tensors: Tensors, mapping: TensorMapping, *, titan: bool, has_balance: bool
) -> Tensors:
    """Return the tensors of a Hugging Face folder under native names: TorchTitan's if `titan`, else
    Meta's.

    `has_balance`: whether the model has balancing biases beside its routers. They are loaded as
    zeros.
    """
    tensors: Tensors = Mapped(hf_tensors, mapping, "native")
    if has_balance:
        shapes = {name: info.shape for name, info in tensors.infos.items()}
        tensors = Joined(tensors, Zeros(balances(shapes)))
    aliases = mapping.aliases["native"]
    new_names = renamed([*tensors.infos, *aliases], "titan" if titan else "meta")
    new_aliases = {new_names[name]: new_names[first] for name, first in aliases.items()}
    return Renamed(tensors, {name: new_names[name] for name in tensors.infos}, new_aliases)


def _fill(tensors: Tensors, _: Source, wanted: Sequence[Wanted]) -> int:
    """Read the elements that this rank wants from `tensors`, and copy them into the rank's own
    tensors. Returns the number of bytes read."""

    def fill(want: Wanted, piece: Piece, block: Region) -> int:
        elements = tensors.read(want.name, block.moved(piece.region.start))
        elements = np.ascontiguousarray(elements).reshape(block.shape)
        dtype: torch.dtype = getattr(torch, tensors.infos[want.name].dtype)
        target = box_of(want.local, block.moved(piece.local.start))
        target.copy_(torch.from_numpy(elements).view(dtype))
        return elements.nbytes

    # Count 4 bytes per element: few folders have a wider dtype than float32.
    jobs = [
        (want, piece, block)
        for want in wanted
        for piece in want.pieces
        for block in blocks(piece.region.shape, 4, BLOCK_BYTES)
    ]
    with ThreadPoolExecutor(min(THREADS_MAX, os.cpu_count() or 1)) as pool:
        return sum(pool.map(lambda job: fill(*job), jobs))
