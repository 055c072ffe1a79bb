"""A Hugging Face folder from a live model: one pass, each rank writes its elements into place.

Shapes fix every file's header and every tensor's offset beforehand. So rank 0 makes the files,
every rank writes the elements that the plan of the save gives it to where they stay, each once, and
rank 0 publishes: nothing is gathered, nothing is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.arguments import checked_path, shown
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.hf_folder import CONFIG, of_language_model
from holdfast.catalog.paths import open_for_reading
from holdfast.comm import Ranks, capture, gather_and_run, run_on_rank_0
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.format.names import HiddenFolder
from holdfast.format.region import Region
from holdfast.format.safetensors import INDEX
from holdfast.hf.assets import beside_weights, config_bytes
from holdfast.hf.check import differences, listed
from holdfast.hf.dialects import is_balance, renamed
from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of
from holdfast.hf.shards import SHARD_BYTES, Export, shard
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.index import Index
from holdfast.storage.local import LocalStore
from holdfast.storage.opening import folder_store
from holdfast.storage.store import Writer
from holdfast.tensors.blocks import blocks, runs
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.numbers import box_of, convert, is_floating, raw_type

BLOCK_BYTES = 16 << 20
"""Converted and written at a time."""


@dataclass(frozen=True, slots=True)
class HFModel:
    """What a live model is called on the hub."""

    config: Mapping[str, Any]
    """What its `config.json` says."""

    assets: str | None = None
    """Folder whose other files an export takes along: tokenizer, templates."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise UsageError(
                "`HFModel.config` must be a dict, as `config.json` has it, found: "
                f"{shown(self.config)}",
                hint="`config.to_dict()` makes one of a configuration of transformers",
            )
        try:
            # As the manifest of every step keeps it.
            json.dumps(dict(self.config), allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"`HFModel.config` must be plain JSON: {error}") from error
        if self.assets is not None:
            object.__setattr__(self, "assets", checked_path(self.assets, "HFModel.assets"))

    @property
    def mapping(self) -> TensorMapping:
        """Between the hub's tensors and those of the model, under Meta's names."""
        config = of_language_model(self.config)
        return mapping_of(family_of(config, where="the configuration of this run"), config)


@dataclass(frozen=True, slots=True)
class ExportSnapshot:
    """What a rank is to write, and where it reads it: of a save that has begun."""

    image: FileLayout
    data_of: Callable[[TensorItem, Region], memoryview]
    """The raw bytes of a box of an item, row-major, counted from the first of its elements."""

    index: Index | None
    """Of all ranks, on rank 0."""

    others: Collection[str]
    """Top-level names that are not the model's."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder that is published."""

    nbytes: int
    lost: tuple[str, ...]
    """Biases that balance experts and are not zero, where the hub has no place for them."""


def export(
    held: ExportSnapshot,
    hub: HFModel,
    dtype: str,
    *,
    catalog: Catalog,
    attempt: HiddenFolder,
    ranks: Ranks,
) -> Exported:
    """Write the model of a save as a Hugging Face folder, in `dtype`, and publish it.

    Collective: every rank calls this with what it holds; an error on one is raised on all, and
    nothing is left of the attempt.
    """
    mapping = hub.mapping
    infos = {
        name: (mapping.dtype("hub", name) or dtype, mapping.shape("hub", name))
        for name in mapping.names("hub")
    }
    made = shard(infos, SHARD_BYTES)
    store = folder_store(catalog.store.url)
    try:
        run_on_rank_0(ranks, lambda: _make_files(held, mapping, made, store, attempt))
        mine = capture(lambda: _write(held, mapping, made, store, attempt))
        return gather_and_run(
            ranks, mine, lambda parts: _finish(made, hub, catalog, attempt, parts)
        )
    except HoldfastError:
        if ranks.rank == 0:
            with suppress(HoldfastError):
                catalog.abort(attempt)
        raise


def _make_files(
    held: ExportSnapshot,
    mapping: TensorMapping,
    made: Export,
    store: LocalStore,
    attempt: HiddenFolder,
) -> None:
    assert held.index is not None, "rank 0 has it"
    whole = held.index.plan
    called = renamed([*(placed.name for placed in whole.tensors), *whole.aliases], "meta")
    native = {
        called[placed.name]: TensorInfo(placed.tensor.dtype, placed.tensor.shape)
        for placed in whole.tensors
        if placed.tensor.path[0] not in held.others
    }
    wrong = differences(native, mapping, "native", "the configuration")
    if wrong:
        raise MismatchError(
            f"the model cannot be exported:{listed(wrong)}",
            hint="is `config.json` in `model.hf_assets_path` the one of this model?",
        )
    for file, image in made.files.items():
        with store.create(f"{attempt}/{file}", image.nbytes) as writer:
            writer.write(0, [image.header])


def _write(
    held: ExportSnapshot,
    mapping: TensorMapping,
    made: Export,
    store: LocalStore,
    attempt: HiddenFolder,
) -> Exported:
    """Write this rank's elements."""
    places = {n: (f, s.offset) for f, i in made.files.items() for n, s in i.tensors.items()}
    wanted = {*mapping.names("native")}
    names = {item.name for item in held.image.tensors}
    called = renamed(names, "meta")
    done, lost = 0, []
    with ExitStack() as opened:
        writers: dict[str, Writer] = {}

        def writer_of(file: str) -> Writer:
            if file not in writers:
                writers[file] = opened.enter_context(store.amend(f"{attempt}/{file}"))
            return writers[file]

        for item in held.image.tensors:
            if called[item.name] not in wanted:
                whole = Region.whole(item.region.shape)
                if is_balance(item.name) and any(held.data_of(item, whole)):
                    lost.append(item.name)
                continue
            for block in blocks(item.region.shape, 8, BLOCK_BYTES):
                at = Region(
                    tuple(map(int.__add__, block.start, item.region.start)),
                    tuple(map(int.__add__, block.stop, item.region.start)),
                )
                data = np.frombuffer(held.data_of(item, block), raw_type(item.dtype))
                for name, box, elements in _pieces(
                    mapping, called[item.name], at, data.reshape(block.shape), item.dtype, made
                ):
                    file, offset = places[name]
                    done += _put(writer_of(file), offset, mapping.shape("hub", name), box, elements)
    return Exported(done, tuple(lost))


def _pieces(
    mapping: TensorMapping,
    name: str,
    region: Region,
    data: np.ndarray[Any, Any],
    dtype: str,
    made: Export,
) -> Iterator[tuple[str, Region, np.ndarray[Any, Any]]]:
    """Where the elements of a region go: tensor, box, and the elements in its shape."""
    stored = made.dtypes
    for copy in mapping.copies("native", name, region, exact=True):
        box = copy.source_view.region
        ours = box_of(data, copy.target_view.region)
        wanted = stored[copy.source] if is_floating(dtype) else dtype
        target = np.empty(box.shape, raw_type(dtype))
        copy.run_back(target, ours)
        yield copy.source, box, convert(target, dtype, wanted)


def _put(
    writer: Writer,
    offset: int,
    shape: tuple[int, ...],
    box: Region,
    elements: np.ndarray[Any, Any],
) -> int:
    raw = np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
    itemsize = elements.itemsize
    at = 0
    for start, length in runs(box, shape):
        nbytes = length * itemsize
        writer.write(offset + start * itemsize, [raw[at : at + nbytes]])
        at += nbytes
    return at


def _finish(
    made: Export, hub: HFModel, catalog: Catalog, attempt: HiddenFolder, parts: Sequence[Exported]
) -> Exported:
    store = catalog.store
    wanted = sum(span.nbytes for image in made.files.values() for span in image.tensors.values())
    written = sum(part.nbytes for part in parts)
    if written != wanted:
        raise MismatchError(f"the ranks wrote {written} bytes of {wanted}")
    small = {CONFIG: config_bytes(hub.config, made.dtype)}
    if hub.assets is not None:
        small |= dict(beside_weights(*open_for_reading(hub.assets)))
    if made.index is not None:
        small[INDEX] = made.index
    for file, data in small.items():
        folder = file.rpartition("/")[0]
        if folder and f"{folder}/" not in store.list(str(attempt)):
            store.make_folder(f"{attempt}/{folder}")
        with store.create(f"{attempt}/{file}", len(data)) as writer:
            writer.write(0, [data])
    catalog.publish(attempt)
    execute(store, plan_cleanup(store.list(), only=attempt.name))
    return Exported(made.nbytes, tuple(sorted({name for part in parts for name in part.lost})))
