"""Crash-safe, verified checkpoints for PyTorch training.

    holdfast.save(path, state)          save one checkpoint; it appears complete or not at all
    holdfast.load(path, state)          load a checkpoint in place, under any parallelism
    holdfast.open(path)                 inspect a checkpoint; reads only the entries you request
    holdfast.dcp                        storage of `torch.distributed.checkpoint`: Writer, Reader
    holdfast.hosts                      Holdfast inside Trainer, Accelerate, Lightning, TorchTitan
    holdfast.data                       data loaders that resume on any number of ranks
    holdfast.CheckpointManager          save during training, delete old checkpoints, resume
    holdfast.sealed(path)               publish files of another program, all or none
    holdfast.check(path)                list what is damaged in any checkpoint
    holdfast.newest_good(folder)        the newest checkpoint that is not damaged
    holdfast.HoldfastError              base class of all errors (see holdfast.errors)
    holdfast.__version__                installed version

`import holdfast` does not import torch; the first use of a function does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from holdfast.errors import (
    DamagedError,
    ExistsError,
    FormatError,
    HoldfastError,
    MismatchError,
    NotFoundError,
    RankError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from holdfast.catalog.newest import check, newest_good
    from holdfast.catalog.seal import sealed
    from holdfast.loading.checkpoint import open_checkpoint as open  # noqa: A004
    from holdfast.loading.load import load
    from holdfast.manager.config import CheckpointConfig
    from holdfast.manager.manager import CheckpointManager
    from holdfast.saving.save import save

    __version__: str

_LAZY = {
    "CheckpointConfig": "holdfast.manager.config:CheckpointConfig",
    "CheckpointManager": "holdfast.manager.manager:CheckpointManager",
    "load": "holdfast.loading.load:load",
    "open": "holdfast.loading.checkpoint:open_checkpoint",
    "check": "holdfast.catalog.newest:check",
    "newest_good": "holdfast.catalog.newest:newest_good",
    "save": "holdfast.saving.save:save",
    "sealed": "holdfast.catalog.seal:sealed",
}

__all__ = [
    "CheckpointConfig",
    "CheckpointManager",
    "DamagedError",
    "ExistsError",
    "FormatError",
    "HoldfastError",
    "MismatchError",
    "NotFoundError",
    "RankError",
    "StorageError",
    "UsageError",
    "check",
    "load",
    "newest_good",
    "open",
    "save",
    "sealed",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "dcp", "hosts", "testing"):
        return import_module(f"holdfast.{name}")
    if name == "__version__":
        return import_module("holdfast.release").installed_version()
    if name not in _LAZY:
        raise AttributeError(f"module `holdfast` has no attribute `{name}`")
    module, _, member = _LAZY[name].partition(":")
    return getattr(import_module(module), member)
