"""Any state, optimizer or edited optimizer loads as it was saved, or is refused by name."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from holdfast.errors import UsageError
from holdfast.testing import round_trip
from kept import Kept

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float8_e5m2,
]

TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 2, shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 99),
)
VIEWS = TENSORS.map(lambda one: one.t() if one.ndim == 2 else one[::2] if one.ndim == 1 else one)
ARRAYS = st.builds(
    lambda dtype, count: np.arange(count).astype(dtype),
    st.sampled_from(["float32", "int64", "uint8", "bool", "uint32", "complex128"]),
    st.integers(0, 4),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int64, st.integers(-(2**40), 2**40))
    | st.builds(np.bool_, st.booleans())
)
KEYS = (
    st.text(max_size=3)
    | st.integers(-3, 12)
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(0, 2), st.text(max_size=2))
    | st.floats(allow_nan=False, allow_infinity=False, width=16)
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, inner, max_size=4)
    return (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | dicts
        | dicts.map(OrderedDict)
        | dicts.map(lambda held: defaultdict(list, held))
        | st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter)
    )


STATES = st.recursive(TENSORS | VIEWS | ARRAYS | SCALARS, containers, max_leaves=14)


def refusable(state: Any) -> bool:
    """Whether the state may be refused: two keys have the same text, or a dot in a key gives two
    entries one name."""
    names: list[str] = []

    def walk(value: Any, name: str) -> None:
        names.append(name)
        if isinstance(value, dict):
            for key, member in value.items():
                walk(member, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for number, member in enumerate(value):
                walk(member, f"{name}.{number}")

    walk(state, "")
    return len({*names}) < len(names)


@contextmanager
def may_be_refused(state: Any) -> Iterator[None]:
    """Allows a refusal if there is a reason for it."""
    try:
        yield
    except UsageError:
        if not refusable(state):
            raise


@given(STATES)
@settings(max_examples=150)
def test_any_state_of_an_object_loads_as_saved(state: Any) -> None:
    """G15. Method: save and load nested containers with keys, dtypes and numbers of every kind."""
    with may_be_refused(state):
        round_trip({"a": Kept(state)}, fresh={"a": Kept()}, modes=("save",))


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), STATES, min_size=1))
@settings(max_examples=40)
def test_any_plain_state_replaces_the_current_one(state: Any) -> None:
    """G15. Method: load a state without objects into an empty one."""
    with may_be_refused(state):
        round_trip(state, fresh=dict.fromkeys(state), modes=("save",))


@given(STATES, st.sampled_from(["disabled", "async", "async_with_pinned_mem"]))
@settings(max_examples=20)
def test_extra_state_of_a_module_loads_as_saved_in_every_mode(state: Any, mode: str) -> None:
    """G15. Method: `get_extra_state` returns any state; the module also has a parameter."""

    class Extra(nn.Module):
        def __init__(self, extra: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.extra = extra

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    fresh = Extra("fresh")
    with may_be_refused(state):
        round_trip({"model": Extra(state)}, fresh={"model": fresh}, modes=(mode,))


OPTIMIZERS: list[Any] = [
    lambda groups: torch.optim.AdamW(groups, lr=0.1),
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.5),
    lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    lambda groups: torch.optim.Rprop(groups, lr=0.1),
    lambda groups: torch.optim.NAdam(groups, lr=0.1),
]

EDITS = st.lists(
    st.sampled_from(["option", "array", "slot", "text", "none", "list", "other", "number"]).flatmap(
        lambda kind: st.tuples(st.just(kind), st.integers(0, 3))
    ),
    max_size=6,
)


def edited(optimizer: Any, edits: list[tuple[str, int]]) -> None:
    """Edit groups and slots like training loops and optimizers do."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for kind, at in edits:
        group = optimizer.param_groups[at % len(optimizer.param_groups)]
        # Torch's optimizers fail on new slots of a parameter that has not had a step yet.
        slots = optimizer.state.get(parameters[at % len(parameters)], {})
        if kind == "option":
            group["step"] = group.get("step", 0) + 1
        elif kind == "array":
            group["table"] = np.arange(at)
        elif kind == "number":
            group["rate"] = np.float64(0.1)
        elif kind == "slot":
            slots[f"mine_{at}"] = torch.full((at,), 1 / 3)
        elif kind == "text":
            slots["text"] = "text"
        elif kind == "none":
            slots["none"] = None
        elif kind == "list":
            slots["list"] = [None, torch.ones(at), {"x": at}]
        else:
            optimizer.state[f"global{at}"] = {"step": at, at: [torch.ones(1)]}


@given(
    st.sampled_from(OPTIMIZERS),
    st.integers(0, 3),
    st.integers(0, 3),
    EDITS,
    st.sampled_from(["save", "disabled", "async_with_pinned_mem"]),
)
@settings(max_examples=60)
def test_any_optimizer_after_any_steps_and_edits_loads_as_saved(
    make: Any, steps: int, cut: int, edits: list[tuple[str, int]], mode: str
) -> None:
    """G15. Method: make random groups, some without parameters, and take random steps. Then edit
    options, slots, and state that belongs to no parameter."""

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        parameters = list(model.parameters())
        groups = [{"params": parameters[:cut]}, {"params": parameters[cut:], "lr": 0.25}]
        return model, make(groups)

    model, optimizer = made()
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Any = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        optimizer.step()
    edited(optimizer, edits)
    fresh, again = made()
    round_trip(
        {"model": model, "optimizer": optimizer},
        fresh={"model": fresh, "optimizer": again},
        modes=(mode,),
    )
