"""Save by a plan of `torch.distributed.checkpoint`: make the attempt, write, publish."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from holdfast.arguments import checked_flag, checked_path
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import delete_hidden, execute, is_at_work, plan_cleanup
from holdfast.catalog.paths import open_for_saving
from holdfast.dcp.plans import Written, chunk_of, global_plan, is_value, layouts_of
from holdfast.dcp.values import container_of
from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest
from holdfast.format.names import HiddenFolder
from holdfast.planning.file_layout import FileLayout, TensorItem, lay_out, lay_out_file
from holdfast.planning.gc_pause import gc_paused
from holdfast.planning.index import Index, columns
from holdfast.saving.publish import publish
from holdfast.saving.save import check_space, software_versions
from holdfast.saving.stage import host_windows
from holdfast.saving.write import write
from holdfast.state.layout import check_elements, dtype_name
from holdfast.state.subclass import is_plain_tensor
from holdfast.storage.opening import is_url
from holdfast.storage.store import Distant
from holdfast.timing import Spans

_STARTED_NS = time.time_ns()
"""Time at which this process imported the module, in nanoseconds since 1970."""


class UnseenFolderError(StorageError):
    """A rank does not see the folder of the save. If another rank has an error, that is the cause:
    the rank that failed has deleted the folder."""


class Writer(StorageWriter):
    """Storage of one DCP save, or of several, one after the other.

    The checkpoint is written into a hidden folder beside `path`, with a checksum per block. Once
    all ranks have written and synced their files, one rename gives the folder its name. A save that
    fails on any rank deletes its own files, and keeps the checkpoint that was at `path`.

    Every rank makes its own `Writer`, with the same path.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """`overwrite`: replace the checkpoint at `path`. A folder with other files in it is never
        replaced.

        Raises:
            UsageError: an argument has the wrong type.
        """
        self._path = _absolute(path, "path")
        self._overwrite = checked_flag(overwrite, "overwrite")
        self._current_folder: str | None = None
        """Current folder of the process that sent this writer to this process; None if the writer
        was made in this process."""

        self._rank = 0
        self._is_coordinator = False
        self._open: _Attempt | None = None
        """Attempt of the save in progress, on the coordinator."""

    def __getstate__(self) -> dict[str, Any]:
        # `async_save` sends the writer to another process, which begins its own attempt. That
        # process may have another current folder.
        state = {"_path": self._path, "_overwrite": self._overwrite}
        return {**state, "_current_folder": str(Path.cwd())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_path"], overwrite=state["_overwrite"])  # type: ignore[misc]
        self._current_folder = state["_current_folder"]

    @property
    def checkpoint_id(self) -> str:
        """Path of the checkpoint."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is the path of a local folder, not a URL."""
        return isinstance(checkpoint_id, str | os.PathLike) and not is_url(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for the next save, at the path `checkpoint_id` if there is one."""
        self._close()
        if checkpoint_id is not None:
            self._path = _absolute(checkpoint_id, "checkpoint_id", folder=self._current_folder)

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self._path)

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        """Begin a save. DCP calls this on every rank.

        Raises:
            UsageError: the ranks are to save without collectives.
        """
        self._close()
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "`use_collectives=False` makes each rank save an index of its own, and no rank "
                "could publish the checkpoint as a whole",
                hint="leave `use_collectives` out",
            )
        self._is_coordinator = is_coordinator
        self._rank = kwargs.get("rank", _default_rank())

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Check the path on every rank, before anything is written."""
        open_for_saving(self._path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder that all ranks write into. DCP calls this on the coordinator.

        Raises:
            ExistsError: the checkpoint at `path` may not be replaced, or another save is writing.
            StorageError: the free space is less than the tensors need.
        """
        nbytes = sum(items[-1].stop for items in layouts_of(plans) if items)
        self._open = _Attempt.begin(self._path, nbytes=nbytes, overwrite=self._overwrite)
        # If another rank fails, DCP does not tell this writer. Then the finalizer deletes the
        # attempt.
        weakref.finalize(self, self._open.close)
        return [replace(plan, storage_data=self._open.mark) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and sync this rank's file. An error deletes the attempt, for all ranks.

        Raises:
            UsageError: the planner caches plans, and `path` is in an object store.
        """
        catalog, name = open_for_saving(self._path)
        if isinstance(catalog.store, Distant) and getattr(planner, "_enable_plan_caching", False):
            self._close()
            raise UsageError(
                f"the planner caches plans, and `{self._path}` is in an object store, where each "
                "save needs a plan of its own",
                hint="leave `enable_plan_caching` out",
            )
        attempt = _attempt_folder(catalog, name, plan.storage_data)
        try:
            written = _write(catalog, attempt, plan, planner, self._rank)
        except BaseException:
            _set_aside(catalog, attempt)
            self._close()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(""), written.result.nbytes, written)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write both indices, and publish. DCP calls this on the coordinator, once all ranks have
        written.

        Raises:
            UsageError: the plan does not cover a tensor.
            StorageError: a rank's file is not visible here, or an index cannot be written.
        """
        assert self._open is not None, "DCP calls `prepare_global_plan` before"
        written: list[Written] = [result.storage_data for rank in results for result in rank]
        try:
            with gc_paused():
                plan, layouts = global_plan(metadata, written)
                layout = {"world_size": len(results)}
                facts = Manifest({}, {}, layout=layout, versions=software_versions())
                publish(
                    self._open.folder,
                    [one.result for one in written],
                    Index(plan, layouts),
                    facts,
                    self._open.catalog,
                )
        except BaseException:
            _set_aside(self._open.catalog, self._open.folder)
            raise
        finally:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


_OPEN: weakref.WeakSet[_Attempt] = weakref.WeakSet()
"""Attempts of this process that are neither published nor closed."""


class _Attempt:
    """An attempt that the coordinator holds."""

    def __init__(self, catalog: Catalog, folder: HiddenFolder) -> None:
        self.catalog = catalog
        self.folder = folder
        self.is_open = True
        self._thread = threading.current_thread()

    @property
    def mark(self) -> str:
        """Text from which every rank computes the name of the attempt.

        Outside object stores, a planner with cached plans may pass an older plan to `write_data`,
        so all plans of this process have the same mark. In an object store, each attempt needs an
        ID of its own, since the files of a checkpoint stay below its ID.
        """
        is_distant = isinstance(self.catalog.store, Distant)
        return self.folder.id if is_distant else _coordinator_mark()

    @property
    def has_ended(self) -> bool:
        """Whether the save of this attempt has ended. It has, if the thread that began it no longer
        runs, or if the same thread is asking: a thread asks only before its next save."""
        return self._thread is threading.current_thread() or not self._thread.is_alive()

    @classmethod
    def begin(cls, path: str, *, nbytes: int, overwrite: bool) -> Self:
        """Clean up after killed saves, check the name and the space, and make the folder."""
        catalog, name = open_for_saving(path)
        store = catalog.store
        store.make_folder("")
        names = store.list()
        is_distant = isinstance(store, Distant)
        for other in [*_OPEN]:
            if other.catalog.store.url == store.url:
                # If the folder is gone, a rank that failed has deleted it, and DCP has not told
                # the writer that holds it.
                is_gone = not is_distant and f"{other.folder}/" not in names
                if is_gone or other.has_ended:
                    other.close()
                elif is_distant and other.folder.name == name:
                    raise _in_progress(catalog, name)
        execute(store, plan_cleanup(names))
        chosen_id = ""
        if not is_distant:
            attempt = _attempt_folder(catalog, name, _coordinator_mark())
            chosen_id = attempt.id
            if f"{attempt}/" in names:
                if is_at_work(store, str(attempt)):
                    raise _in_progress(catalog, name)
                _set_aside(catalog, attempt)
        is_empty = f"{name}/" in names and not store.list(name)
        replaces = overwrite or is_empty
        hint = "choose another path, or pass `overwrite=True` to replace it"
        catalog.check_free(name, replace=replaces, hint=hint)
        check_space(catalog, name, nbytes)
        begun = cls(catalog, catalog.begin(name, replace=replaces, chosen_id=chosen_id))
        _OPEN.add(begun)
        return begun

    def close(self) -> None:
        """Delete the attempt, unless it was published. May be called twice."""
        if self.is_open:
            self.is_open = False
            _OPEN.discard(self)
            self.catalog.release(self.folder)
            # Delete by a cleanup, which keeps a folder that is in use: by now, a later save of this
            # process may use a folder of this name.
            execute(self.catalog.store, plan_cleanup([f"{self.folder}/"]))


def _absolute(path: object, what: str, *, folder: str | None = None) -> str:
    """Return the absolute path, since the save may run in a process with another current folder.

    `folder`: folder that a relative path starts from; None for the current folder.
    """
    text = checked_path(path, what)
    # Return a URL unchanged. At each save, every rank checks whether Holdfast can write to it.
    if is_url(text):
        return text
    return os.path.abspath(os.path.join(folder or "", text))  # noqa: PTH100, PTH118 - links stay


def _write(
    catalog: Catalog, attempt: HiddenFolder, plan: SavePlan, planner: SavePlanner, rank: int
) -> Written:
    """Write the file of one rank, and sync it."""
    spans = Spans()
    with spans("plan"), gc_paused():
        values = [item for item in plan.items if is_value(item)]
        chunks = {chunk_of(item): item for item in plan.items if not is_value(item)}
        items = lay_out(list(chunks))
        # Each value is encoded before a byte is written, so a value that is refused costs nothing.
        containers = [([item.index.fqn], container_of(item, planner)) for item in values]
        layout = lay_out_file(rank, items, containers)
    check_space(catalog, attempt.name, layout.nbytes)

    def windows_of(item: TensorItem) -> Iterable[memoryview]:
        write_item = chunks[item.name, item.dtype, item.region]
        return host_windows(_resolved(write_item, item, planner), item.dtype)

    result = _write_file(catalog, attempt, layout, windows_of, spans)
    result = replace(result, seconds=dict(spans.seconds))
    return Written(rank, result, [(item.name, item.region) for item in items], columns(items))


def _write_file(
    catalog: Catalog, attempt: HiddenFolder, layout: FileLayout, windows_of: Any, spans: Spans
) -> Any:
    store = catalog.store
    # Check that this host sees the folder of the attempt. An object store does not list a folder
    # without files, and is the same on every host.
    if not isinstance(store, Distant) and f"{attempt}/" not in store.list():
        raise _deleted(catalog, attempt)
    try:
        with torch.no_grad():
            return write(store, str(attempt), layout, windows_of, spans=spans)
    except NotFoundError as error:
        raise _deleted(catalog, attempt) from error


def _deleted(catalog: Catalog, attempt: HiddenFolder) -> UnseenFolderError:
    return UnseenFolderError(
        f"`{catalog.where(attempt.name)}`: this rank does not see the folder of the save",
        hint="another rank has failed, and its error says why; or this host does not share "
        f"`{catalog.store.url}` with the coordinator, or has another path",
    )


def _resolved(write_item: WriteItem, item: TensorItem, planner: SavePlanner) -> torch.Tensor:
    """Return the planner's tensor for an item. Check that it has the plan's dtype and shape."""
    tensor = planner.resolve_data(write_item)
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"`{item.name}`: the planner gave a {type(tensor).__name__}, no tensor")
    tensor = tensor.detach()
    if not is_plain_tensor(tensor) or tensor.layout != torch.strided:
        raise UsageError(
            f"`{item.name}` is a {type(tensor).__module__}.{type(tensor).__qualname__} of layout "
            f"{tensor.layout}, which has no one array of elements",
            hint="save the plain tensors it consists of",
        )
    check_elements(item.name, tensor)
    found = dtype_name(tensor.dtype), tuple(tensor.shape)
    if found != (item.dtype, item.region.shape):
        raise UsageError(
            f"`{item.name}`: the plan says {item.dtype} {list(item.region.shape)}, the planner "
            f"gave {found[0]} {list(found[1])}"
        )
    return tensor


def _attempt_folder(catalog: Catalog, name: str, mark: object) -> HiddenFolder:
    """Return the attempt of checkpoint `name`, which every rank finds from the coordinator's `mark`
    (see `_Attempt.mark`)."""
    if isinstance(catalog.store, Distant):
        return HiddenFolder("attempt", name, str(mark))
    return HiddenFolder("attempt", name, f"{checksum(f'{mark}/{name}'.encode()):016x}"[:8])


def _in_progress(catalog: Catalog, name: str) -> ExistsError:
    return ExistsError(
        f"another save to `{catalog.where(name)}` is in progress in this process",
        hint="wait for its future first",
    )


def _coordinator_mark() -> str:
    """Return a text that identifies this process. Every call returns the same text."""
    return f"{os.uname().nodename}-{os.getpid()}-{_STARTED_NS}"


def _set_aside(catalog: Catalog, attempt: HiddenFolder) -> None:
    """Delete the attempt of a failed save, from any rank. This renames the attempt first, so that
    ranks that are still writing cannot add files to it."""
    with suppress(HoldfastError):
        delete_hidden(catalog.store, attempt)


def _default_rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
