"""Export of a live model as a Hugging Face folder, by all ranks together.

Shapes determine every header and every tensor's offset. So rank 0 creates the files, every rank
writes the elements that the plan of the save assigns to it, once and in their final position, and
rank 0 publishes. Nothing is gathered, and nothing is written twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from holdfast.arguments import checked_path, shown
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.hf_folder import of_language_model
from holdfast.comm import Ranks, capture, gather_and_run, run_on_rank_0
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.format.names import HiddenFolder
from holdfast.format.region import Region
from holdfast.hf.assets import files_beside, stem_of, write_small
from holdfast.hf.check import check_exportable
from holdfast.hf.dialects import is_balance, renamed
from holdfast.hf.families import family_of, table_of
from holdfast.hf.family import mapping_of
from holdfast.hf.own_names import check_own_names, keeps_names, own_dtypes, own_names_mapping
from holdfast.hf.shards import ExportLayout, shard
from holdfast.planning.file_layout import FileLayout, TensorItem
from holdfast.planning.index import Index
from holdfast.planning.write_plan import GlobalPlan
from holdfast.storage.local import LocalStore
from holdfast.storage.opening import folder_store
from holdfast.storage.store import FileWriter
from holdfast.tensors.blocks import blocks, runs
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.numbers import Array, box_of, convert, is_floating, raw_type, too_large
from holdfast.tensors.relation import SideName

BLOCK_BYTES = 16 << 20
"""Bytes that a rank converts and writes at a time."""


@dataclass(frozen=True, slots=True)
class HFModel:
    """Description of a live model for its export as a Hugging Face folder."""

    config: Mapping[str, Any]
    """Contents of `config.json`."""

    assets: str | None = None
    """Path of a folder whose other files an export copies: tokenizer, templates."""

    exact: bool = False
    """Whether a load refuses weights whose own `config.json` has another rotary base, epsilon or
    routing than `config`; false: it logs each difference as a warning."""

    seq_len: int | None = None
    """Length of the training sequences, in tokens; None: unknown. An export logs whether its
    configuration allows longer inputs."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise UsageError(
                "`HFModel.config` must be a dict, the contents of `config.json`, found: "
                f"{shown(self.config)}",
                hint="`config.to_dict()` makes one of a configuration of transformers",
            )
        try:
            # The manifest of every checkpoint includes the configuration as JSON.
            json.dumps(dict(self.config), allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"`HFModel.config` must be plain JSON: {error}") from error
        if self.assets is not None:
            object.__setattr__(self, "assets", checked_path(self.assets, "HFModel.assets"))

    @property
    def mapping(self) -> TensorMapping:
        """Mapping between the Hugging Face tensors and the model's, under Meta's names."""
        config = of_language_model(self.config)
        return mapping_of(family_of(config, where="the configuration of this run"), config)


@dataclass(frozen=True, slots=True)
class ExportSnapshot:
    """This rank's part of a save that has begun."""

    file_layout: FileLayout
    """Tensors that this rank writes."""

    data_of: Callable[[TensorItem, Region], memoryview]
    """Function that returns the row-major bytes of a box of an item. The box is relative to the
    item's first element."""

    index: Index | None
    """Index of the save, on rank 0."""

    others: Collection[str]
    """First keys of the paths of tensors outside of the model, such as `optimizer`."""

    @property
    def plan(self) -> GlobalPlan:
        """Plan of the save. On rank 0 only."""
        assert self.index is not None, "rank 0 has it"
        return self.index.plan

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of each tensor of the model, on all ranks together. On rank 0 only."""
        return _infos(self.plan, self.others)


def check_live(plan: GlobalPlan, others: Collection[str], model: HFModel) -> None:
    """Check that a live model can be exported. `plan`: global plan of a save of the model.
    `others`: first keys of the paths of tensors outside of the model, such as `optimizer`.

    Raises:
        MismatchError: the model's tensors are not those of its configuration. All differences are
            listed.
        FormatError: no family matches the configuration, and the tensors do not have Hugging Face
            names.
    """
    infos = _infos(plan, others)
    if _own_names(infos, model) is None:
        _check_native(plan, infos, model.mapping)


def _check_native(
    plan: GlobalPlan, infos: Mapping[str, TensorInfo], mapping: TensorMapping
) -> None:
    names = renamed([*(placed.name for placed in plan.tensors), *plan.aliases], "meta")
    check_exportable({names[name]: info for name, info in infos.items()}, mapping, "native")


def _infos(plan: GlobalPlan, others: Collection[str]) -> dict[str, TensorInfo]:
    """Return dtype and shape of each tensor of the model, on all ranks together."""
    return {
        placed.name: TensorInfo(placed.tensor.dtype, placed.tensor.shape)
        for placed in plan.tensors
        if placed.tensor.path[0] not in others
    }


@dataclass(frozen=True, slots=True)
class Exported:
    """Result of an export, or of one rank's part of it."""

    nbytes: int
    lost: tuple[str, ...]
    """Names of nonzero biases that balance experts and have no Hugging Face tensor."""

    note: str = ""
    """Line for the log if the export keeps the names of the live model; else empty."""

    infinite: tuple[str, ...] = ()
    """Names of tensors with a number that is too large for the dtype of the export."""

    untied: str = ""
    """Name of a tensor that the configuration ties to another but the live model does not; empty:
    there is none."""


def export(
    snapshot: ExportSnapshot,
    model: HFModel,
    dtype: str,
    *,
    catalog: Catalog,
    attempt: HiddenFolder,
    ranks: Ranks,
) -> Exported:
    """Write the model of a save as a Hugging Face folder, in `dtype`, and publish it.

    Collective: every rank calls this with its own `snapshot`. An error on one rank aborts the
    attempt and is raised on all ranks.
    """
    try:
        named = run_on_rank_0(ranks, lambda: _own_names(snapshot.infos, model))
        mapping = model.mapping if named is None else own_names_mapping(named.infos)
        tensors = (
            own_dtypes(named.infos, dtype)
            if named is not None
            else {
                name: (mapping.dtype("hf", name) or dtype, mapping.shape("hf", name))
                for name in mapping.names("hf")
            }
        )
        layout = shard(tensors, stem=stem_of(model.config))
        store = folder_store(catalog.store.url)
        job = _Job(snapshot, mapping, layout, store, attempt, renames=named is None)
        run_on_rank_0(ranks, job.create_files)
        result = capture(job.write)
        exported = gather_and_run(
            ranks, result, lambda results: _publish(layout, model, catalog, attempt, results)
        )
        untied = run_on_rank_0(ranks, lambda: _untied(snapshot, model, renames=named is None))
        return replace(exported, note="" if named is None else named.note, untied=untied)
    except HoldfastError:
        if ranks.rank == 0:
            with suppress(HoldfastError):
                catalog.abort(attempt)
        raise


@dataclass(frozen=True, slots=True)
class _OwnNames:
    """A live model that is exported under the names it has."""

    infos: Mapping[str, TensorInfo]
    note: str


def _own_names(infos: Mapping[str, TensorInfo], model: HFModel) -> _OwnNames | None:
    """Return the tensors of a model that keeps its names; None for a model with native names."""
    config = of_language_model(model.config)
    if not keeps_names(infos, config):
        return None
    return _OwnNames(infos, check_own_names(infos, config))


def _untied(snapshot: ExportSnapshot, model: HFModel, *, renames: bool) -> str:
    """Return the name of a tensor that the configuration ties to another, but that is a tensor of
    its own in the live model; empty if there is none. `renames`: whether the live model has native
    names."""
    if table_of(of_language_model(model.config)) is None:
        return ""
    infos, mapping = snapshot.infos, model.mapping
    names = renamed(infos, "meta").values() if renames else infos.keys()
    side: SideName = "native" if renames else "hf"
    return next((name for name in mapping.aliases[side] if name in {*names}), "")


@dataclass(frozen=True, slots=True)
class _Job:
    """One rank's part of an export."""

    snapshot: ExportSnapshot
    mapping: TensorMapping
    layout: ExportLayout
    store: LocalStore
    attempt: HiddenFolder
    renames: bool
    """Whether the mapping has Meta's names, not those of the live model."""

    def _native_names(self, names: Collection[str]) -> Mapping[str, str]:
        return renamed(names, "meta") if self.renames else {name: name for name in names}

    def create_files(self) -> None:
        """Check that the model fits the mapping, and create every file with its header."""
        if self.renames:
            _check_native(self.snapshot.plan, self.snapshot.infos, self.mapping)
        for file, layout in self.layout.files.items():
            with self.store.create(f"{self.attempt}/{file}", layout.nbytes) as writer:
                writer.write(0, [layout.header])

    def write(self) -> Exported:
        """Write this rank's elements into the files that rank 0 has created."""
        locations = {
            name: (file, span.offset)
            for file, layout in self.layout.files.items()
            for name, span in layout.tensors.items()
        }
        exported, items = {*self.mapping.names("native")}, self.snapshot.file_layout.tensors
        native_names = self._native_names({item.name for item in items})
        nbytes, lost, infinite = 0, list[str](), set[str]()
        with ExitStack() as stack:

            @cache
            def writer_of(file: str) -> FileWriter:
                return stack.enter_context(self.store.amend(f"{self.attempt}/{file}"))

            for item in items:
                native = native_names[item.name]
                if native not in exported:
                    region = Region.whole(item.region.shape)
                    if is_balance(item.name) and any(self.snapshot.data_of(item, region)):
                        lost.append(item.name)
                    continue
                for block in blocks(item.region.shape, 8, BLOCK_BYTES):
                    for name, box, elements, fits in self._pieces(item, native, block):
                        infinite |= set() if fits else {name}
                        file, offset = locations[name]
                        shape = self.mapping.shape("hf", name)
                        nbytes += _write_box(writer_of(file), offset, shape, box, elements)
        return Exported(nbytes, tuple(lost), infinite=tuple(sorted(infinite)))

    def _pieces(
        self, item: TensorItem, native: str, block: Region
    ) -> Iterator[tuple[str, Region, Array, bool]]:
        """Convert a block of an item. For each box that the block fills in a Hugging Face tensor,
        yield the tensor's name, the box, the converted elements, and whether all numbers fit into
        the new dtype. `native`: name of the item's tensor in the mapping."""
        dtype, region = item.dtype, block.moved(item.region.start)
        data = np.frombuffer(self.snapshot.data_of(item, block), raw_type(dtype))
        data = data.reshape(block.shape)
        for copy in self.mapping.copies("native", native, region, exact=True):
            box = copy.source_view.region
            elements = np.empty(box.shape, raw_type(dtype))
            copy.run_back(elements, box_of(data, copy.target_view.region))
            target_dtype = self.layout.dtypes[copy.source] if is_floating(dtype) else dtype
            converted = convert(elements, dtype, target_dtype)
            fits = too_large(elements, dtype, converted, target_dtype) is None
            yield copy.source, box, converted, fits


def _write_box(
    writer: FileWriter, offset: int, shape: tuple[int, ...], box: Region, elements: Array
) -> int:
    """Write the elements of a box of a tensor. `offset`: position of the tensor in its file.
    `shape`: shape of the tensor. Returns the number of bytes."""
    raw = np.ascontiguousarray(elements).reshape(-1).view(np.uint8).data
    itemsize, written = elements.itemsize, 0
    for start, length in runs(box, shape):
        nbytes = length * itemsize
        writer.write(offset + start * itemsize, [raw[written : written + nbytes]])
        written += nbytes
    return written


def _publish(
    layout: ExportLayout,
    model: HFModel,
    catalog: Catalog,
    attempt: HiddenFolder,
    results: Sequence[Exported],
) -> Exported:
    """Write the files besides the weights, and publish the folder. Returns the results of all ranks
    together."""
    store = catalog.store
    expected = sum(span.nbytes for file in layout.files.values() for span in file.tensors.values())
    written = sum(result.nbytes for result in results)
    if written != expected:
        raise MismatchError(f"the ranks wrote {written} bytes, expected: {expected}")
    contents = files_beside(model.config, model.assets, layout.dtype, layout.index)
    write_small(store, store, str(attempt), contents)
    catalog.publish(attempt)
    execute(store, plan_cleanup(store.list(), only=attempt.name))
    lost = {name for result in results for name in result.lost}
    infinite = {name for result in results for name in result.infinite}
    return Exported(layout.nbytes, tuple(sorted(lost)), infinite=tuple(sorted(infinite)))
