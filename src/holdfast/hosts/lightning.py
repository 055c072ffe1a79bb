"""Holdfast in Lightning and Fabric: single files by `HoldfastIO`, sharded folders by a strategy.

    L.Trainer(plugins=[holdfast.hosts.lightning.HoldfastIO()])
    L.Trainer(strategy=holdfast.hosts.lightning.ModelParallel(...))
    L.Fabric(strategy=holdfast.hosts.lightning.FabricModelParallel(...))

The classes derive from those of `lightning`, if the process has imported it, else from those of
`pytorch_lightning` and `lightning_fabric`. Written for Lightning 2.6.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from holdfast.catalog.findings import summary_of
from holdfast.catalog.newest import check
from holdfast.catalog.open_any import open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.comm import all_ranks, run_on_rank_0
from holdfast.errors import DamagedError, HoldfastError, StorageError
from holdfast.hosts.sealing import delete, sealed_by_all
from holdfast.storage.opening import is_url

logger: logging.Logger = logging.getLogger("holdfast")

_PART = ".part-"
"""Start of the name of a file that is being written."""

_LAST = "last"
"""Start of the names that `save_last` and `ckpt_path="last"` use."""

__all__ = ["FabricModelParallel", "HoldfastIO", "ModelParallel"]  # noqa: F822 - made on use


def __getattr__(name: str) -> Any:
    if name == "HoldfastIO":
        return _io_class()
    if name == "ModelParallel":
        return _strategy_class("pytorch")
    if name == "FabricModelParallel":
        return _strategy_class("fabric")
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def _module(kind: str, name: str) -> Any:
    """Module `name` of Lightning's part `kind`, in the package that the process uses."""
    own = {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"}[kind]
    package = f"lightning.{kind}" if "lightning" in sys.modules else own
    return import_module(f"{package}.{name}")


@cache
def _io_class() -> type:
    base: Any = _module("fabric", "plugins").TorchCheckpointIO

    class HoldfastIO(base):  # type: ignore[misc]
        """Plugin that makes every checkpoint file durable before it has its name, and checks it
        before it is loaded.

        The file stays Lightning's: `torch.save` has a CRC-32 per tensor in it, which is checked
        here. `ckpt_path="last"` loads the newest good file of the folder: with a warning if that is
        another one, because `last` is damaged or older. Any other damaged file is an error.
        """

        def save_checkpoint(
            self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
        ) -> None:
            if storage_options is not None or is_url(path):
                # The base class raises its TypeError, or saves to the URL.
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            import torch

            # The base class would write in the system's temporary folder, where a killed save
            # leaves its file, and the move from there may be a copy.
            with _published(Path(path)) as part:
                torch.save(checkpoint, part)

        def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            good = path if is_url(path) else _good(Path(path))
            loaded: dict[str, Any] = super().load_checkpoint(good, *args, **kwargs)
            return loaded

        def remove_checkpoint(self, path: Any) -> None:
            if not is_url(path) and Path(path).is_dir():
                delete(Path(path))
            else:
                super().remove_checkpoint(path)

    return HoldfastIO


@cache
def _strategy_class(kind: str) -> type:
    base: Any = _module(kind, "strategies").ModelParallelStrategy

    class ModelParallel(base):  # type: ignore[misc]
        """`ModelParallelStrategy` whose checkpoints appear complete or not at all: the shards and
        `meta.pt` together, with `holdfast.seal`.

        A checkpoint is checked before it is loaded, on rank 0. `ckpt_path="last"` loads the newest
        good one of the folder: with a warning if that is another one than `last`.
        """

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            # The trainer passes (checkpoint, path), Fabric (path, state).
            name, place = ("filepath", 1) if kind == "pytorch" else ("path", 0)
            if name in kwargs:
                path = kwargs.pop(name)
            else:
                path = args[place]
                args = (*args[:place], *args[place + 1 :])
            path = str(self.broadcast(path))
            if not self._save_distributed_checkpoint:
                super().save_checkpoint(*args, **kwargs, **{name: path})
                return
            _remove_file(path, self.is_global_zero)
            ranks = all_ranks()
            try:
                with sealed_by_all(path, ranks=ranks, publishes=self.is_global_zero) as folder:
                    super().save_checkpoint(*args, **kwargs, **{name: folder})
            finally:
                ranks.close()

        def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            name = "checkpoint_path" if kind == "pytorch" else "path"
            if name in kwargs:
                path = kwargs.pop(name)
            else:
                path, *args = args  # type: ignore[assignment]
            path = Path(str(self.broadcast(path)))
            ranks = all_ranks()
            try:
                good = run_on_rank_0(ranks, lambda: _good(path))
            finally:
                ranks.close()
            loaded: dict[str, Any] = super().load_checkpoint(good, *args, **kwargs)
            return loaded

        def remove_checkpoint(self, filepath: Any) -> None:
            if self.is_global_zero and Path(filepath).is_dir():
                delete(Path(filepath))
            elif self.is_global_zero:
                Path(filepath).unlink(missing_ok=True)

    ModelParallel.__name__ = "ModelParallel" if kind == "pytorch" else "FabricModelParallel"
    return ModelParallel


def _remove_file(path: str, is_first: bool) -> None:
    """Remove a single file that has the name of a sharded checkpoint, as the strategy does."""
    if is_first and Path(path).is_file():
        Path(path).unlink()


@contextmanager
def _published(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write. At the end it is durable, and gets the name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_parts(path.parent)
    # A name of its own: another process may be saving to this path too.
    part = path.parent / f"{_PART}{path.name}-{os.urandom(4).hex()}"
    try:
        with part.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # `torch.save` raises a RuntimeError while it handles the error of the file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise StorageError(f"cannot save `{path}`: {cause.strerror or cause}") from error
        raise


def _remove_parts(folder: Path) -> None:
    """Remove files that killed saves have left: those that no process holds."""
    for part in folder.glob(f"{_PART}*"):
        with suppress(OSError):
            opened = os.open(part, os.O_RDWR)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(opened)


def _good(path: Path) -> Path:
    """The checkpoint at `path`, checked. For a `last`: the newest good one of its folder, which is
    another one if a save was killed before it replaced `last`."""
    candidates = [path]
    if path.name.startswith(_LAST) and path.exists():
        beside = [
            other
            for other in path.parent.glob(f"[!.]*{path.suffix}")
            if other == path or (other.exists() and not _holds_weights_alone(other))
        ]
        candidates = sorted(beside, key=lambda p: (p.stat().st_mtime_ns, p == path), reverse=True)
    for candidate in candidates:
        why = _why_not_good(candidate)
        if why is None:
            if candidate != path:
                logger.warning("loading `%s`, the newest good one beside `%s`", candidate, path)
            return candidate
        if not path.name.startswith(_LAST):
            raise DamagedError(
                f"`{path}` is damaged: {why}",
                hint='`ckpt_path="last"` takes the newest good one, with `save_last=True`',
            )
        logger.warning("passed over `%s`: %s", candidate, why)
    raise DamagedError(f"no checkpoint in `{path.parent}` is good")


def _holds_weights_alone(path: Path) -> bool:
    """Whether this is a file that a `ModelCheckpoint` with `save_weights_only` has written: no run
    can resume from it. False if it is damaged."""
    if path.is_dir():
        return False
    store, name = open_for_reading(path)
    try:
        manifest = open_any(store, name).manifest
    except HoldfastError:
        return False
    paths = [entry.path for entry in manifest.tensors.values()]
    paths += [entry.path for entry in manifest.values.values()]
    keys = {path[0] for path in paths}
    return "pytorch-lightning_version" in keys and "optimizer_states" not in keys


def _why_not_good(path: Path) -> str | None:
    if not path.exists():
        # The framework's own error says more.
        return None
    try:
        findings = check(path)
    except HoldfastError as error:
        return error.what
    return summary_of(findings) if findings else None
