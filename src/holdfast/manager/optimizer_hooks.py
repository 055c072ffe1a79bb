"""Optimizers that wait, before each step, until the tensors that they change are copied."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from torch.optim import Optimizer

from holdfast.manager.lifetime import Lifetime


class OptimizerHooks:
    """Hooks that make optimizers call `wait` before each step, until the manager is closed."""

    def __init__(self, lifetime: Lifetime, wait: Callable[[], None]) -> None:
        self._lifetime, self._wait = lifetime, wait
        self._hooked: WeakSet[Optimizer] = WeakSet()

    def add(self, optimizer: Optimizer) -> None:
        """Add the hook to an optimizer, unless it has one."""
        if optimizer not in self._hooked:
            self._hooked.add(optimizer)
            hook = optimizer.register_step_pre_hook(lambda *_: self._wait())
            self._lifetime.callback(hook.remove)
