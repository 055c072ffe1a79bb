"""The random number generators of a process: torch, its GPUs, numpy and Python."""

from __future__ import annotations

import random
import sys
from typing import Any, ClassVar

import torch


class RngState:
    """The generators as one `Stateful`; one entry a rank, since each rank draws its own numbers."""

    optional: ClassVar = ("rank_",)
    """Entries that a checkpoint may lack, or have beyond these."""

    def __init__(self, rank: int) -> None:
        self._key = f"rank_{rank}"

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            state["numpy"] = (str(name), keys.tolist(), *map(_plain, rest))
        return {self._key: state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = state_dict[self._key]
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        if "numpy" in state:
            import numpy

            name, keys, *rest = state["numpy"]
            numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))


def _plain(value: Any) -> int | float:
    """Of what numpy gives: an int or a float of Python's own."""
    plain: int | float = value.item() if hasattr(value, "item") else value
    return plain
