"""An object that keeps any state, for tests of `state_dict` and `load_state_dict`."""

from __future__ import annotations

from typing import Any


class Kept:
    """Object whose `state_dict` returns `state`."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict
