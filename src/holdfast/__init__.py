"""Checkpoints for PyTorch training that are never lost, never lying, never in the way.

    holdfast.save(path, state)          one checkpoint, published whole or not at all
    holdfast.load(path, state)          in place, from any layout to any other
    holdfast.open(path)                 look into one, reading only what is asked for
    holdfast.CheckpointManager          when to save, what to keep, where to resume from
    holdfast.HoldfastError              and its classes, by what to do next (holdfast.errors)
    holdfast.__version__                what is installed

Nothing here imports torch before it is used.
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
    from holdfast.loading.checkpoint import open_checkpoint as open  # noqa: A004
    from holdfast.loading.load import load
    from holdfast.manager.config import CheckpointConfig
    from holdfast.manager.manager import CheckpointManager
    from holdfast.saving.save import save

    __version__: str

_HOMES = {
    "CheckpointConfig": "holdfast.manager.config:CheckpointConfig",
    "CheckpointManager": "holdfast.manager.manager:CheckpointManager",
    "load": "holdfast.loading.load:load",
    "open": "holdfast.loading.checkpoint:open_checkpoint",
    "save": "holdfast.saving.save:save",
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
    "load",
    "open",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("holdfast.testing")
    if name == "__version__":
        return import_module("holdfast.release").installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module `holdfast` has no attribute `{name}`")
    module, _, member = _HOMES[name].partition(":")
    return getattr(import_module(module), member)
