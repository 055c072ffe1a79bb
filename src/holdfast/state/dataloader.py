"""A data loader's place in the data."""

from __future__ import annotations

from typing import Any

from holdfast.state.tree import Stateful

RANK = "rank_"
"""Begins the key of one rank's own state."""


class DataloaderState:
    """A data loader as one `Stateful`, whatever its state means on other ranks.

    A loader that says `state_is_global = True` has one state for all ranks: a position in a global
    order of samples, say. It is kept once, and any number of ranks can take it. Of any other loader
    each rank's state is its own, and fits the same number of ranks only.
    """

    def __init__(self, loader: Stateful, rank: int) -> None:
        self.is_global = bool(getattr(loader, "state_is_global", False))
        self._loader = loader
        self._key = f"{RANK}{rank}"

    def state_dict(self) -> dict[str, Any]:
        state = self._loader.state_dict()
        return state if self.is_global else {self._key: state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loader.load_state_dict(state_dict if self.is_global else state_dict[self._key])
