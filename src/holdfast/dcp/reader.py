"""Load by a plan of `torch.distributed.checkpoint`: read only its byte ranges, and check them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from holdfast.arguments import checked_path
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.paths import open_parent
from holdfast.catalog.source import Source, read_value
from holdfast.catalog.steady import UNREADABLE
from holdfast.dcp.values import for_planner
from holdfast.errors import HoldfastError, MismatchError, NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.loading.fit import fits, needs_check, unfit_line
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.gc_pause import gc_paused
from holdfast.spelling import counted, listed
from holdfast.state.layout import check_elements, dtype_name
from holdfast.state.match import SHARES_MEMORY
from holdfast.state.shard import Piece
from holdfast.state.strides import overlaps_itself
from holdfast.storage.opening import is_url
from holdfast.storage.store import ReadStore

BATCH_BYTES = 1 << 30
"""About how many bytes of tensors are read before they are passed to the planner. This limits the
memory that is needed if the planner gives temporary tensors to read into."""

_LISTED_MAX = 50


class Reader(StorageReader):
    """Storage of DCP loads, from a checkpoint of Holdfast or of stock DCP.

    Reads the byte ranges that the plan needs, in parallel, and compares every block with its
    checksum. Neither the index nor a value can run code.

    Every rank makes its own `Reader`, with the same path.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        """`threads`: number of reading threads; None to divide the host's cores between the ranks
        that torchrun has started on it.

        Raises:
            UsageError: `path` is not a path.
        """
        self._path = checked_path(path, "path")
        if not is_url(self._path):
            # The load may run later, with another current folder.
            self._path = os.path.abspath(self._path)  # noqa: PTH100 - links stay links
        self._threads = threads
        self._opened: tuple[ReadStore, Opened] | None = None
        self._error: HoldfastError | None = None
        """Error of `read_metadata`, until `set_up_storage_reader` has raised it."""

    @property
    def checkpoint_id(self) -> str:
        """Path of the checkpoint."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is the path of a local folder, not a URL."""
        return isinstance(checkpoint_id, str | os.PathLike) and not is_url(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for the next load, from the path `checkpoint_id` if there is one."""
        self._opened = self._error = None
        if checkpoint_id is not None:
            self._path = checked_path(checkpoint_id, "checkpoint_id")

    def read_metadata(self, **kwargs: Any) -> Metadata:
        """Read the index, on every rank, without unpickling anything.

        If this fails, a load of DCP hides the error and calls this again with `rank`. The second
        call returns no entries, and `set_up_storage_reader`, which DCP calls next, raises the error
        of the first.

        Raises:
            NotFoundError: there is no checkpoint at the path.
            DamagedError: files are missing, or have another size than the manifest says.
            FormatError: the index cannot be read.
        """
        if "rank" in kwargs and self._error is not None:
            return _metadata(Manifest({}, {}), self._path)
        self._error = None
        try:
            with gc_paused():
                store, name = open_parent(self._path)
                self._opened = store, open_in(store, name)
                return _metadata(self._opened[1].manifest, self._path)
        except HoldfastError as error:
            self._error = error
            raise

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Raise the error of `read_metadata`, if it has failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Add to the plan the fingerprint of the checkpoint that this rank has opened, which
        `prepare_global_plan` compares."""
        assert self._opened is not None, "DCP calls `read_metadata` before"
        return replace(plan, storage_data=self._opened[1].fingerprint)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that all ranks have opened the same checkpoint.

        Raises:
            MismatchError: ranks have opened different checkpoints.
        """
        for rank, plan in enumerate(plans):
            if plan.storage_data != plans[0].storage_data:
                raise MismatchError(
                    f"ranks 0 and {rank} see different checkpoints at `{self._path}`",
                    hint="another save was replacing it: load again. If this repeats, the ranks' "
                    "hosts do not share the folder",
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read everything that the plan lists.

        Calls `resolve_tensor` of the planner twice for each tensor item: to check whether the item
        fits, before anything is changed, and to fill the tensor.

        Raises:
            MismatchError: tensors do not fit. The message lists all of them, and this rank has
                changed nothing. Or: a number is too large for a smaller float dtype. Then the state
                is loaded in part.
            DamagedError: bytes are missing, or are not the bytes that were written. The message
                names file, tensor and block.
            FormatError: reading a value would run code that the checkpoint names.
            NotFoundError: another save has replaced the checkpoint during the read.
        """
        assert self._opened is not None, "DCP calls `read_metadata` before"
        store, opened = self._opened
        source = opened.source(store)
        try:
            checked = _read_checked(source, plan, planner, self._threads)
            _read_values(source, plan, planner)
            for batch in _batches(source.manifest, plan):
                _read_batch(source, batch, planner, self._threads, checked)
        except UNREADABLE as error:
            if opened.was_replaced(store):
                raise NotFoundError(
                    f"`{source.url}` was replaced or deleted while it was read",
                    hint="load again; tensors may hold a mixture of both checkpoints until then",
                ) from error
            raise
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _metadata(manifest: Manifest, path: str) -> Metadata:
    """Convert a manifest to the metadata that DCP expects."""
    entries: dict[str, Any] = {n: _tensor_metadata(e) for n, e in manifest.tensors.items()}
    entries |= dict.fromkeys(manifest.values, BytesStorageMetadata())
    paths = {name: entry.path for name, entry in manifest.tensors.items()}
    paths |= {name: entry.path for name, entry in manifest.values.items()}
    return Metadata(
        state_dict_metadata=entries,
        planner_data=paths,
        storage_data={},
        storage_meta=StorageMeta(checkpoint_id=path),
    )


def _tensor_metadata(entry: TensorEntry) -> TensorStorageMetadata:
    regions = [chunk.region for chunk in entry.chunks]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(region.start), torch.Size(region.shape))
            for region in regions
        ],
    )


def _read_checked(
    source: Source, plan: LoadPlan, planner: LoadPlanner, threads: int | None
) -> dict[int, torch.Tensor]:
    """Check whether the tensor items of the plan fit the planner's tensors, as `holdfast.load`
    does. Return new tensors with the elements of the items that had to be read for this check, by
    the `id` of the item.

    Raises:
        MismatchError: tensors do not fit. The message lists all of them.
    """
    lines: dict[str, None] = {}
    staged: list[tuple[ReadItem, torch.Tensor, torch.dtype]] = []
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            continue
        target, name = _resolved(item, planner), item.storage_index.fqn
        stored, wanted = _dtype(source.manifest, item), target.dtype
        if not torch.can_cast(stored, wanted):
            line = f"`{name}` is {dtype_name(stored)} in the checkpoint, expected {wanted}"
            lines[line] = None
        elif overlaps_itself(target) or _overlaps_elsewhere(item, planner):
            lines[f"`{name}` {SHARES_MEMORY}: clone it"] = None
        elif needs_check(stored, wanted) and target.numel():
            made = torch.empty(target.shape, dtype=stored, device=target.device)
            staged.append((item, made, wanted))
    if not lines:
        reads = [_wanted(item, made) for item, made, _ in staged]
        read_tensors(source, reads, threads, num_local=_num_local())
        for item, made, wanted in staged:
            if not fits(made, wanted):
                lines[unfit_line(item.storage_index.fqn, wanted)] = None
    if lines:
        raise MismatchError(
            f"`{source.url}` does not fit, {counted(len(lines), 'difference')}, this rank changed "
            "nothing:" + listed([*lines], _LISTED_MAX),
            hint="load into tensors of the dtypes that the checkpoint has, each with memory of its "
            f"own: `holdfast show {source.url}` lists the dtypes",
        )
    return {id(item): made for item, made, _ in staged}


def _overlaps_elsewhere(item: ReadItem, planner: LoadPlanner) -> bool:
    """Return whether elements of the whole tensor that the item is a part of share memory. False if
    the planner is not torch's, and only it knows the whole tensor."""
    if not isinstance(planner, DefaultLoadPlanner):
        return False
    is_stock = type(planner).resolve_tensor is DefaultLoadPlanner.resolve_tensor
    return is_stock and overlaps_itself(planner.lookup_tensor(item.dest_index))


def _resolved(item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
    """Return the tensor of the planner that the item goes to.

    Raises:
        UsageError: it has another shape than the item, or no plain elements.
    """
    target = planner.resolve_tensor(item).detach()
    name, shape = item.storage_index.fqn, tuple(item.lengths)
    if tuple(target.shape) != shape:
        raise UsageError(
            f"`{name}`: the plan reads {list(shape)}, the planner gave a tensor of shape "
            f"{list(target.shape)}"
        )
    check_elements(name, target)
    return target


def _read_values(source: Source, plan: LoadPlan, planner: LoadPlanner) -> None:
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            name = item.storage_index.fqn
            entry = source.manifest.values.get(name)
            if entry is None:
                raise MismatchError(
                    f"`{name}` is a tensor in the checkpoint, and a value in the state",
                    hint=f"`holdfast show {source.url}` lists what it holds",
                )
            container = read_value(source, name, entry)
            where = f"{source.url}/{entry.file}"
            planner.load_bytes(item, for_planner(name, container, where=where))


def _batches(manifest: Manifest, plan: LoadPlan) -> Iterator[list[ReadItem]]:
    """Yield the tensor items of the plan in lists of about `BATCH_BYTES`."""
    batch: list[ReadItem] = []
    nbytes = 0
    for item in plan.items:
        if item.type == LoadItemType.BYTE_IO:
            continue
        batch.append(item)
        nbytes += item.lengths.numel() * _dtype(manifest, item).itemsize
        if nbytes >= BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    yield batch


def _read_batch(
    source: Source,
    batch: Sequence[ReadItem],
    planner: LoadPlanner,
    threads: int | None,
    checked: Mapping[int, torch.Tensor],
) -> None:
    """Fill the planner's tensors for all items of a batch. `checked`: see `_read_checked`."""
    targets = [_resolved(item, planner) for item in batch]
    pairs = list(zip(batch, targets, strict=True))
    wanted = [
        _wanted(item, target)
        for item, target in pairs
        if target.numel() and id(item) not in checked
    ]
    with torch.no_grad():
        read_tensors(source, wanted, threads, num_local=_num_local())
        for item, target in pairs:
            if id(item) in checked:
                target.copy_(checked[id(item)])
    for item, target in pairs:
        planner.commit_tensor(item, target)


def _wanted(item: ReadItem, target: torch.Tensor) -> Wanted:
    region = _region_of(item)
    return Wanted(item.storage_index.fqn, [Piece(region, Region.whole(region.shape))], target)


def _region_of(item: ReadItem) -> Region:
    """Return the position of the wanted elements in the whole tensor."""
    chunk_start = item.storage_index.offset or (0,) * len(item.lengths)
    start = tuple(map(int.__add__, chunk_start, item.storage_offsets))
    return Region(start, tuple(map(int.__add__, start, item.lengths)))


def _dtype(manifest: Manifest, item: ReadItem) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, manifest.tensors[item.storage_index.fqn].dtype)
    return dtype


def _num_local() -> int:
    """Return the number of ranks that torchrun has started on this host; 1 if it is unknown."""
    num_local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(num_local)) if num_local.isdecimal() else 1
