"""The state of a process's random number generators: torch, its accelerator's, numpy and Python."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from holdfast import accelerator


class RngState:
    """State of this process's random number generators, as a `Stateful`. It differs between
    ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator. Numpy's is included if numpy was imported."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        # The generators of an accelerator have its kind as their key, such as "cuda".
        state |= accelerator.rng_states()
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, keys, *rest = numpy.random.get_state()
            state["numpy"] = (name, keys.tolist(), *rest)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every saved generator that exists in this process."""
        torch.set_rng_state(state_dict["torch"])
        random.setstate(state_dict["python"])
        accelerator.set_rng_states(state_dict)
        if "numpy" in state_dict:
            import numpy

            name, keys, *rest = state_dict["numpy"]
            numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))
