"""Optimizers that wait for the copy of what they change."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

from torch.optim import Optimizer

from holdfast.manager.holding import Holding


class StepWaits:
    """Has optimizers wait before each step, until the manager is closed."""

    def __init__(self, held: Holding, wait: Callable[[], None]) -> None:
        self._held, self._wait = held, wait
        self._waiting: WeakSet[Optimizer] = WeakSet()

    def add(self, optimizer: Optimizer) -> None:
        """Have an optimizer wait, if it does not yet."""
        if optimizer not in self._waiting:
            self._waiting.add(optimizer)
            hook = optimizer.register_step_pre_hook(lambda *_: self._wait())
            self._held.callback(hook.remove)
