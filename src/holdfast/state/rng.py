"""The random number generators of a process: torch, its GPUs, numpy and Python."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RngState:
    """The generators of this process as one `Stateful`: each rank draws its own numbers."""

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator that there is."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            state["numpy"] = (str(name), keys.tolist(), *map(_plain, rest))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put every generator that is here, and was there, where it was."""
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"])
        if "numpy" in state_dict:
            import numpy

            name, keys, *rest = state_dict["numpy"]
            numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))


def _plain(value: Any) -> int | float:
    """Of what numpy gives: an int or a float of Python's own."""
    plain: int | float = value.item() if hasattr(value, "item") else value
    return plain
