"""Holdfast in Lightning and Fabric: single files by `HoldfastIO`, sharded folders by a strategy.

    L.Trainer(plugins=[holdfast.hosts.lightning.HoldfastIO()])
    L.Trainer(strategy=holdfast.hosts.lightning.ModelParallel(...))
    L.Fabric(strategy=holdfast.hosts.lightning.FabricModelParallel(...))

The classes derive from those of `lightning`, if the process has imported it, else from those of
`pytorch_lightning` and `lightning_fabric`. Written for Lightning 2.6.
"""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.comm import all_ranks, run_on_rank_0
from holdfast.errors import DamagedError, UsageError
from holdfast.hosts.at_urls import (
    LAST,
    delete_at,
    good_copy,
    good_copy_on_all_hosts,
    handles,
    holds_weights_alone,
    saved_file,
)
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.files import file_moved_aside, kept_aside, published, why_not_good
from holdfast.hosts.folders import host_folder
from holdfast.hosts.sealing import delete, sealed_by_all
from holdfast.storage.opening import is_url, local_path

logger: logging.Logger = logging.getLogger("holdfast")

__all__ = ["FabricModelParallel", "HoldfastIO", "ModelParallel"]  # noqa: F822 - made on use


if TYPE_CHECKING:
    _Framework = Any
else:
    _Framework = object
"""Class of the framework, from which the classes of this module derive too."""


def __getattr__(name: str) -> Any:
    if name == "HoldfastIO":
        return _io_class()
    if name == "ModelParallel":
        return _strategy_class("pytorch")
    if name == "FabricModelParallel":
        return _strategy_class("fabric")
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def _module(kind: str, name: str) -> Any:
    """Import module `name` of Lightning's part `kind`, which is "pytorch" or "fabric".

    Use the package `lightning` if the process has imported it, else `pytorch_lightning` or
    `lightning_fabric`.
    """
    own = {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[kind]
    package = f"lightning.{kind}" if "lightning" in sys.modules else own
    return import_module(f"{package}.{name}")


@cache
def _io_class() -> type:
    base: Any = _module("fabric", "plugins").TorchCheckpointIO
    return _made("HoldfastIO", _HoldfastIO, base)


def _made(name: str, own: type, base: type) -> type:
    """Return a class of this module with the methods of `own`, which come before those of the
    framework's class `base`. pickle finds the class by its name."""
    names = {"__module__": __name__, "__qualname__": name, "__doc__": own.__doc__}
    return type(name, (own, base), names)


class _HoldfastIO(_Framework):  # type: ignore[misc]
    """Plugin that gives a checkpoint file its name once it is complete, makes it durable in a
    thread, and checks it before it is loaded.

    The format of the file stays Lightning's. The check uses the CRC-32 that `torch.save` stores
    for each tensor. `ckpt_path="last"`, and any path whose last part begins with `last`, loads
    the newest good file of the folder. If that file is not `last`, because `last` is damaged or
    another good file is newer, a warning says so. Under any other path, a damaged file is an
    error. Paths may be URLs of object stores.
    """

    def __init__(self) -> None:
        super().__init__()
        self._background = BackgroundSync()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if storage_options is not None or (is_url(path) and not handles(path)):
            # The base class raises its TypeError, or saves to the URL.
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        import torch

        # The base class would write in the system's temporary folder, where a killed save
        # leaves its file, and the move from there may be a copy.
        with (
            saved_file(str(path))
            if is_url(path)
            else published(Path(local_path(path)), self._background)
        ) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if handles(path):
            return self._load_from_url(str(path), *args, **kwargs)
        good = path if is_url(path) else good_at(Path(path))
        loaded: dict[str, Any] = super().load_checkpoint(good, *args, **kwargs)
        return loaded

    def _load_from_url(self, url: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        temporary = TemporaryFolder.make()
        try:
            found = good_copy(url, temporary.path)
            # If there is nothing, the framework's own error says more.
            loaded: dict[str, Any] = super().load_checkpoint(
                url if found is None else found.path, *args, **kwargs
            )
        finally:
            temporary.delete()
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        if is_url(path) and not handles(path):
            super().remove_checkpoint(path)
        else:
            _delete_later(self._background, path)

    def teardown(self) -> None:
        self._background.wait()
        super().teardown()


@cache
def _strategy_class(kind: str) -> type:
    base: Any = _module(kind, "strategies").ModelParallelStrategy
    if kind == "pytorch":
        return _made("ModelParallel", _ModelParallel, base)
    return _made("FabricModelParallel", _FabricModelParallel, base)


class _ModelParallel(_Framework):  # type: ignore[misc]
    """`ModelParallelStrategy` whose checkpoints appear complete or not at all: the shards and
    `meta.pt` together, with `holdfast.seal`.

    Rank 0 checks a checkpoint before it is loaded. `ckpt_path="last"` loads the newest good
    checkpoint of the folder. If this is not `last`, a warning says so.
    """

    _saved_to = "filepath", 1
    """Name and position of the path in the arguments of `save_checkpoint`."""

    _loaded_from = "checkpoint_path"
    """Name of the path in the arguments of `load_checkpoint`."""

    _own: Path | None = None
    """Folder from which or to which this rank loads or saves just now."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        name, place = self._saved_to
        if name in kwargs:
            path = kwargs.pop(name)
        else:
            path = args[place]
            args = (*args[:place], *args[place + 1 :])
        path = str(self.broadcast(path))
        if not self._save_distributed_checkpoint:
            if is_url(path):
                raise UsageError(
                    f"`{path}`: without shards, Lightning's strategy needs a local path",
                    hint="leave out `save_distributed_checkpoint=False`, or pass a folder",
                )
            super().save_checkpoint(*args, **kwargs, **{name: path})
            return
        ranks = all_ranks()
        try:
            with sealed_by_all(
                path,
                ranks=ranks,
                publishes=self.is_global_zero,
                background=self._background(),
                replaces_file=file_moved_aside,
            ) as folder:
                self._own = folder
                super().save_checkpoint(*args, **kwargs, **{name: folder})
        finally:
            self._own = None
            ranks.close()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        # Lightning broadcasts the path of a checkpoint. With a URL, each host has a folder of
        # its own.
        return obj if obj is not None and obj is self._own else super().broadcast(obj, src)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            _delete_later(self._background(), filepath)

    def teardown(self) -> None:
        self._background().wait()
        super().teardown()

    def _background(self) -> BackgroundSync:
        # Made on use, since a user's subclass may have another signature of `__init__`.
        if not hasattr(self, "_background_here"):
            self._background_here = BackgroundSync()
        return self._background_here

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        name = self._loaded_from
        if name in kwargs:
            path = kwargs.pop(name)
        else:
            path, *args = args  # type: ignore[assignment]
        path = str(self.broadcast(path))
        ranks = all_ranks()
        try:
            with host_folder(ranks) if is_url(path) else nullcontext() as folder:
                if folder is not None:
                    self._own = good = good_copy_on_all_hosts(path, folder, ranks)
                else:
                    good = run_on_rank_0(ranks, lambda: good_at(Path(path)))
                loaded: dict[str, Any] = super().load_checkpoint(good, *args, **kwargs)
        finally:
            self._own = None
            ranks.close()
        return loaded


class _FabricModelParallel(_ModelParallel):
    __doc__ = _ModelParallel.__doc__

    _saved_to = "path", 0
    _loaded_from = "path"


def _delete_later(background: BackgroundSync, place: Any) -> None:
    """Delete the file or folder at a path or URL, once the checkpoints before are durable."""
    if is_url(place):
        background.delete(str(place), partial(delete_at, str(place)))
        return
    path = Path(place).absolute()

    def work() -> None:
        if path.is_dir():
            delete(path)
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("`%s` stays: %s", path, error.strerror)

    background.delete(str(path), work)


def good_at(path: Path) -> Path:
    """Check the checkpoint at `path`, and return the path to load.

    If the name of `path` begins with `last`, return the newest good checkpoint of its folder: a
    save that was killed before it replaced `last` may have left a newer one.
    """
    candidates = [path] if path.exists() else []
    candidates += kept_aside(path.parent, path.name)
    if path.name.startswith(LAST) and candidates:
        beside = {*candidates, *path.parent.glob(f"[!.]*{path.suffix}")}
        beside = {p for p in beside if p.exists() and (p == path or not _is_weights_alone(p))}
        candidates = sorted(beside, key=lambda p: (p.stat().st_mtime_ns, p == path), reverse=True)
    if not candidates:
        return path  # The framework's own error says more.
    for candidate in candidates:
        why = why_not_good(candidate)
        if why is None:
            if candidate != path:
                logger.warning("loading `%s`, the newest good one beside `%s`", candidate, path)
            return candidate
        if candidate is candidates[-1] and not path.name.startswith(LAST):
            raise DamagedError(
                f"`{path}` is damaged: {why}",
                hint='`ckpt_path="last"` takes the newest good one, with `save_last=True`',
            )
        logger.warning("passed over `%s`: %s", candidate, why)
    raise DamagedError(f"no checkpoint in `{path.parent}` is good")


def _is_weights_alone(path: Path) -> bool:
    return holds_weights_alone(*open_for_reading(path))
