"""Holdfast inside other frameworks. Each module imports its framework on first use.

transformers   `HoldfastMixin` for `Trainer` and the trainers of TRL
accelerate     `prepare` for an `Accelerator`
lightning      `HoldfastIO` and `ModelParallel` for Lightning and Fabric
torchtitan     `CheckpointManager` for TorchTitan

For a framework without a module, `sealed` and `newest_good` do the same as `holdfast.sealed` and
`holdfast.newest_good`, but are called by all ranks of a job.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.hosts.on_all_ranks import newest_good as newest_good
    from holdfast.hosts.on_all_ranks import sealed as sealed

_MODULES = ("accelerate", "lightning", "torchtitan", "transformers")

_FUNCTIONS = ("newest_good", "sealed")
"""Functions of `on_all_ranks`. It imports torch, so it is imported on use."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"holdfast.hosts.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module("holdfast.hosts.on_all_ranks"), name)
    raise AttributeError(f"module `holdfast.hosts` has no attribute `{name}`")
