"""Model parts as one tree of parameters and persistent buffers, by fully qualified name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from holdfast.errors import UsageError

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Path elements that `torch.compile` and activation checkpointing add, and no checkpoint has."""


@cache
def canonical(name: str) -> str:
    """A parameter's name without what wrappers add to it.

    >>> canonical("layers.0._checkpoint_wrapped_module.attention.wq.weight")
    'layers.0.attention.wq.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def bare(part: nn.Module) -> nn.Module:
    """The module that DDP has wrapped, whose names are those of a model on one rank."""
    if isinstance(part, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner: nn.Module = part.module
        return inner
    return part


class ModelState:
    """One or several parts of a model (pipeline stages) as one `Stateful`."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        without: Collection[str] = (),
        may_lack: Collection[str] = (),
    ) -> None:
        """`without`: names that are left out; `may_lack`: names that a checkpoint may not have."""
        self._parts = list(map(bare, parts))
        self._without = frozenset(without)
        self.may_lack = frozenset(may_lack)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers themselves, with their gradients."""
        state: dict[str, Any] = {}
        for part in self._parts:
            # A DTensor takes long to detach; whoever reads or fills it does so with its local one.
            for named, value in part.state_dict(keep_vars=True).items():
                name = canonical(named)
                if name in state:
                    raise UsageError(f"two model parts hold `{name}`")
                if name not in self._without:
                    state[name] = value
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what is not a tensor; tensors have been loaded in place."""
        for part in self._parts:
            extra = {
                name: state_dict[canonical(name)]
                for name, value in part.state_dict().items()
                if not isinstance(value, torch.Tensor)
            }
            if extra:
                part.load_state_dict(extra, strict=False)


def adapted(parts: Sequence[nn.Module]) -> tuple[ModelState, ModelState]:
    """A model that is trained in part: what its steps hold, all but frozen parameters; and all of
    it, as its base has it, which may lack what is trained."""
    bared = map(bare, parts)
    named = [pair for part in bared for pair in part.named_parameters(remove_duplicate=False)]
    frozen = [canonical(name) for name, one in named if not one.requires_grad]
    trained = [canonical(name) for name, one in named if one.requires_grad]
    return ModelState(parts, without=frozen), ModelState(parts, may_lack=trained)


def named_parameters(parts: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, under the first of its names."""
    for part in map(bare, parts):
        for name, parameter in part.named_parameters():
            yield canonical(name), parameter
