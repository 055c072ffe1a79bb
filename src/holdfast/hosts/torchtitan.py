"""Holdfast in TorchTitan: a checkpoint manager with TorchTitan's own configuration.

    config.checkpoint = holdfast.hosts.torchtitan.CheckpointManager.Config(enable=True, ...)

Written for TorchTitan 0.3.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.marks import pin
from holdfast.catalog.open_any import is_checkpoint
from holdfast.catalog.steady import UNREADABLE
from holdfast.comm import Ranks, all_ranks, run_on_rank_0
from holdfast.dcp import Reader, Writer
from holdfast.dcp.writer import UnseenFolderError
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.components import MODEL
from holdfast.format.names import steps_among
from holdfast.hosts.sealing import sealed_by_all
from holdfast.manager.policy import Retention
from holdfast.manager.resume import mark_unless_store_failed, newest_resumable
from holdfast.manager.retention import Retainer
from holdfast.storage.opening import (
    is_url,
    store_to_save,
    without_scheme,
    written_store,
)
from holdfast.storage.store import Store

if TYPE_CHECKING:
    from torchtitan.components.checkpointer import CheckpointManager as _Manager
else:
    _Manager = object

logger: logging.Logger = logging.getLogger("holdfast")

dcp: Any = torch.distributed.checkpoint
"""torch's DCP. Untyped, since torch does not export its functions to type checkers."""

__all__ = ["CheckpointManager"]  # noqa: F822 - made on use


def __getattr__(name: str) -> Any:
    if name == "CheckpointManager":
        return _manager_class()
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def _titan() -> Any:
    """Return TorchTitan's `CheckpointManager`."""
    return import_module("torchtitan.components.checkpointer").CheckpointManager


@cache
def _manager_class() -> Any:
    base = _titan()
    # Both classes are made at run time, when TorchTitan's class is known. pickle finds them by
    # these names.
    names = {"__module__": __name__, "__qualname__": "CheckpointManager.Config"}
    config = make_dataclass(
        "Config", [], bases=(base.Config,), namespace=names, kw_only=True, slots=True
    )
    config.__doc__ = "Configuration with the keys and the defaults of TorchTitan."
    members = {"__module__": __name__, "__doc__": _TitanManager.__doc__, "Config": config}
    return type("CheckpointManager", (_TitanManager, base), members)


class _TitanManager(_Manager):  # type: ignore[misc]
    """TorchTitan's `CheckpointManager`, with Holdfast for saving and loading.

    A checkpoint appears complete or not at all, with a checksum per block. `load_step = -1` takes
    the newest checkpoint that a run can resume from, and passes over damaged ones. `keep_latest_k`
    counts good checkpoints only. TorchTitan can load these checkpoints without Holdfast.

    The folder may be in an object store. If it is at a URL that Holdfast cannot write to,
    TorchTitan's own code saves and loads.
    """

    _catalog: Catalog | None = None
    """Catalog of the checkpoint folder; None while checkpoints are disabled, and for a URL that
    Holdfast cannot write to."""

    _retainer: Retainer | None = None

    _ranks_here: Ranks | None = None

    _step = 0
    """Step of the last save."""

    def __init__(self, config: Any, **components: Any) -> None:
        super().__init__(config, **components)
        if not getattr(self, "enable", True):
            return
        store = _store_at(self.folder)
        if store is None:
            logger.warning(
                "`%s` is a URL to which Holdfast cannot write: TorchTitan saves and loads there "
                "itself",
                self.folder,
            )
            return
        self._catalog = Catalog(store)
        self._retainer = Retainer(self._catalog, Retention(latest_k=self.keep_latest_k))

    # ------------------------------------------------------------------------------------- saving

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        self._step = curr_step
        saved: bool = super()._save(curr_step, last_step)
        return saved

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: Any,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save a checkpoint, which gets its name once it is complete.

        Collective. Returns the futures that TorchTitan expects of an asynchronous save.

        Raises:
            HoldfastError: a rank failed. Nothing is published, and the older checkpoints stay.
        """
        rest = (async_mode, enable_garbage_collection, to_hf)
        if _store_at(checkpoint_id) is None:
            return super().dcp_save(state_dict, checkpoint_id, *rest)
        if to_hf:
            ranks = self._ranks()
            publishes = ranks.rank == 0
            with sealed_by_all(
                checkpoint_id, ranks=ranks, publishes=publishes, moves_aside=True
            ) as folder:
                return super().dcp_save(state_dict, str(folder), *rest)
        writer = Writer(checkpoint_id)
        storage = {"storage_writer": writer, "checkpoint_id": writer.checkpoint_id}
        saved: Any = None
        if async_mode == "disabled":
            with _own_errors():
                dcp.save(state_dict, **storage)
        elif async_mode == "async":
            saved = dcp.async_save(state_dict, **storage, process_group=self.pg)
        else:
            saved = dcp.async_save(
                state_dict,
                **storage,
                process_group=self.pg,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
        if enable_garbage_collection:
            collection = import_module("torchtitan.tools.utils").GarbageCollection
            collection.collect("GC collection invoked by checkpointer.")
        return saved

    def _purge_stale_checkpoints(self, *args: Any, **kwargs: Any) -> None:
        if self._retainer is None:
            super()._purge_stale_checkpoints(*args, **kwargs)
        elif self._should_purge():
            self._pin_exempt()
            self._retainer.saved(self._step)

    def _should_purge(self) -> bool:
        with _buckets_seen():
            purges: bool = super()._should_purge()
        return purges

    def _pin_exempt(self) -> None:
        """Pin the steps that `purge_exempt` selects: a setting that TorchTitan has after 0.3."""
        exempt = getattr(self, "purge_exempt", None)
        if exempt is not None and self._catalog is not None:
            for step in filter(exempt, self._catalog.steps()):
                pin(self._catalog.store, step)

    def _close(self) -> None:
        super()._close()
        if self._retainer is not None:
            self._retainer.wait()

    # ------------------------------------------------------------------------------------ loading

    def load(self, step: int = -1) -> bool:
        """Load checkpoint `step`; -1 takes the newest good one.

        Collective. Warns about each newer checkpoint that is passed over, and why. Returns False if
        there is nothing to load.

        Raises:
            NotFoundError: there are checkpoints, but a run cannot resume from any of them.
            DamagedError: the checkpoint `step` is damaged.
        """
        catalog = self._catalog
        if catalog is None or not run_on_rank_0(self._ranks(), self._prepare):
            return self._load_by_titan(step)
        if step != -1:
            return self._load_requested(step)
        passed_over: list[str] = []
        below: int | None = None
        while True:
            newest, refused = run_on_rank_0(self._ranks(), lambda: self._newest(below))  # noqa: B023
            for line in refused:
                self._pass_over(line, passed_over)
            if newest is None:
                return self._load_initial(passed_over)
            try:
                loaded = self._load_by_titan(newest)
            except UNREADABLE as error:
                # The error is raised on every rank, so all ranks try the same step next.
                self._pass_over(f"step {newest}: {error.what}", passed_over)
                if self._ranks().rank == 0 and not self.load_only:
                    mark_unless_store_failed(catalog, newest, error)
                below = newest
            else:
                self._protect(newest)
                return loaded

    def _prepare(self) -> bool:
        """Clean up after killed saves. Return whether the folder of checkpoints exists."""
        assert self._catalog is not None, "a URL has no catalog"
        store = self._catalog.store
        try:
            names = store.list()
        except NotFoundError:
            return False
        if not self.load_only:
            for problem in execute(store, plan_cleanup(names)):
                logger.warning("%s; the next start tries again", problem)
        return True

    def _newest(self, below: int | None) -> tuple[int | None, list[str]]:
        """Return the newest step to resume from, and a line on each newer step that was refused.

        `below`: look only at earlier steps than this one; None for all steps.
        """
        assert self._catalog is not None, "a URL has no catalog"
        found, refused = newest_resumable(self._catalog, below)
        return (None if found is None else found.step), refused

    def _pass_over(self, line: str, passed_over: list[str]) -> None:
        if line not in passed_over:
            passed_over.append(line)
            if self._ranks().rank == 0:
                logger.warning("passed over %s", line)

    def _load_requested(self, step: int) -> bool:
        try:
            loaded = self._load_by_titan(step)
        except UNREADABLE as error:
            newest = "`checkpoint.load_step = -1` takes the newest good checkpoint"
            error.hint = f"{error.hint}; {newest}" if error.hint else newest
            raise
        self._protect(step)
        return loaded

    def _load_initial(self, passed_over: list[str]) -> bool:
        """Load `initial_load_path`, if it is set.

        If `passed_over` says that checkpoints of the run were passed over, raise a NotFoundError.
        """
        assert self._catalog is not None, "a URL has no catalog"
        store = self._catalog.store

        def holds_checkpoint() -> bool:
            folders = steps_among(store.list()).values()
            return any(is_checkpoint(store, folder) for folder in folders)

        # Folders without an index do not count: killed saves of TorchTitan itself leave them.
        is_damaged: bool = bool(passed_over) and run_on_rank_0(self._ranks(), holds_checkpoint)
        if is_damaged:
            listed = "\n  ".join(passed_over)
            raise NotFoundError(
                f"no step in `{self.folder}` can be resumed from:\n  {listed}",
                hint="use another `checkpoint.folder`; its `checkpoint.initial_load_path` may be a "
                "model-only step of this one",
            )
        return self._load_by_titan(-1)

    def _load_by_titan(self, step: int) -> bool:
        """Load a step by TorchTitan's own method, which calls `dcp_load`."""
        with _buckets_seen():
            loaded: bool = super().load(step)
        return loaded

    def _protect(self, step: int) -> None:
        """Exempt from retention the step that the run resumed from, and all newer steps."""
        if self._catalog is not None and self._retainer is not None and self._ranks().rank == 0:
            self._retainer.resumed(step, [s for s in self._catalog.steps() if s > step])

    def _find_load_step(self, folder: str = "", **limits: Any) -> int:
        if self._catalog is None or folder:
            found: int = super()._find_load_step(folder, **limits)
            return found
        try:
            newest, _ = self._newest(None)
        except NotFoundError:
            return -1
        return -1 if newest is None else newest

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load a checkpoint of Holdfast or stock DCP, and check each block that is read.

        Collective. Hugging Face folders, and URLs that Holdfast cannot open, are loaded by
        TorchTitan's own code.

        Raises:
            DamagedError: bytes are missing, or are not the bytes that were written.
            FormatError: the checkpoint cannot be read, or only by running code that it names.
        """
        if from_hf or _store_at(checkpoint_id) is None:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        else:
            _read(state_dict, checkpoint_id, self.states)

    def _load_checkpoint(
        self, states: dict[str, Any], checkpoint_id: str, *, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load as `dcp_load` does. Versions of TorchTitan after 0.3 call this method instead."""
        if from_hf or _store_at(checkpoint_id) is None:
            super()._load_checkpoint(
                states, checkpoint_id, from_hf=from_hf, from_quantized=from_quantized
            )
        else:
            _read(self._flattened_model_states_sd(states), checkpoint_id, states)

    def _ranks(self) -> Ranks:
        if self._ranks_here is None:
            self._ranks_here = all_ranks()
        return self._ranks_here


def _store_at(path: str) -> Store | None:
    """Return the store of a folder or a URL; None if TorchTitan saves and loads there without
    Holdfast."""
    is_folder = not is_url(without_scheme(path))
    return store_to_save(path) if is_folder else written_store(path)


class _Filesystem:
    """TorchTitan's module `filesystem`, with Holdfast's `isdir` and `exists` for object stores."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def isdir(self, path: str) -> bool:
        """Return whether there is a folder at `path`."""
        store = _store_at(path) if is_url(path) else None
        if store is None:
            found: bool = self._module.isdir(path)
            return found
        try:
            return bool(store.list())
        except NotFoundError:
            return False

    exists = isdir


@contextmanager
def _buckets_seen() -> Iterator[None]:
    """Context in which TorchTitan's manager uses Holdfast to look for folders in object stores, so
    that no client of fsspec is needed."""
    module: Any = import_module(_titan().__module__)
    before = getattr(module, "filesystem", None)
    if before is None:
        yield
        return
    module.filesystem = _Filesystem(before)
    try:
        yield
    finally:
        module.filesystem = before


def _read(state_dict: dict[str, Any], checkpoint_id: str, states: dict[str, Any]) -> None:
    with _own_errors():
        dcp.load(state_dict, storage_reader=Reader(checkpoint_id), checkpoint_id=checkpoint_id)
    # The model's tensors are at the top level of the state, so DCP does not call `load_state_dict`
    # of TorchTitan's wrapper of the model.
    if MODEL in states:
        states[MODEL].load_state_dict(state_dict)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Context that converts DCP's `CheckpointException`, which wraps the errors of all ranks.

    If all of them are errors of Holdfast, raise the error of the lowest rank instead. Prefer any
    other error to an UnseenFolderError, which may only follow from it.
    """
    try:
        yield
    except CheckpointException as wrapped:
        failures = {rank: error for rank, (error, _) in sorted(wrapped.failures.items())}
        errors = [error for error in failures.values() if isinstance(error, HoldfastError)]
        if len(errors) < len(failures):
            raise
        raise min(errors, key=lambda error: isinstance(error, UnseenFolderError)) from wrapped
