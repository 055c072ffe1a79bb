"""Holdfast inside other frameworks. Each module imports its framework on first use.

transformers   `HoldfastMixin` for `Trainer` and the trainers of TRL
accelerate     `prepare` for an `Accelerator`
lightning      `HoldfastIO` and `ModelParallel` for Lightning and Fabric
torchtitan     `CheckpointManager` for TorchTitan
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = ("accelerate", "lightning", "torchtitan", "transformers")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"holdfast.hosts.{name}")
    raise AttributeError(f"module `holdfast.hosts` has no attribute `{name}`")
