"""Checks of a load before it changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import MismatchError


def model_of(number: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, number)
    return model


def groups_of(model: nn.Linear, *rates: float) -> torch.optim.Optimizer:
    held: list[Any] = [{"params": [one]} for one in model.parameters()]
    held = held if len(rates) > 1 else [{"params": [*model.parameters()]}]
    groups = [{**group, "lr": rate} for group, rate in zip(held, rates, strict=True)]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize("kind", ["fraction", "infinity", "groups", "whole"])
def test_values_that_do_not_fit_are_found_before_anything_changes(
    kind: str, tmp_path: Path
) -> None:
    """G15. Method: a fraction or infinity for an int, options that differ within one group, a
    number that is too large; a module, a tensor and a list beside them stay unchanged."""
    saved, live = model_of(5.0), model_of(1.0)
    one, other = {
        "fraction": (torch.tensor(1.5), 3),
        "infinity": (torch.tensor(float("inf")), 3),
        "groups": (groups_of(saved, 0.1, 0.2), groups_of(live, 9.0)),
        "whole": (torch.tensor([2**40]), torch.zeros(1, dtype=torch.int32)),
    }[kind]
    holdfast.save(tmp_path / "one", {"m": saved, "n": one, "x": torch.ones(1), "z": [1]})
    state: dict[str, Any] = {"m": live, "n": other, "x": torch.zeros(1), "z": [0]}
    with pytest.raises(MismatchError, match=r"1 differences, nothing was changed:\n  `n`"):
        holdfast.load(tmp_path / "one", state)
    assert (live.weight == 1).all()
    assert not state["x"].any()
    assert state["z"] == [0]
    assert state["n"] is other
    if kind == "groups":
        assert other.param_groups[0]["lr"] == 9.0


def test_a_tensor_of_one_whole_number_loads_into_a_number(tmp_path: Path) -> None:
    """G15. Method: tensors of one element; NaN into a float."""
    saved = {"a": torch.tensor(3.0), "b": torch.tensor([4]), "c": torch.tensor(float("nan"))}
    holdfast.save(tmp_path / "one", saved)
    state: dict[str, Any] = {"a": 0, "b": 0.5, "c": 0.5}
    holdfast.load(tmp_path / "one", state)
    assert (state["a"], state["b"]) == (3, 4.0)
    assert type(state["a"]) is int
    assert state["c"] != state["c"]


class Pair(nn.Module):
    """Two weights: separate, one parameter, one memory, or one memory with dims swapped."""

    def __init__(self, kind: str, one: float, two: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((2, 3), one))
        self.b = nn.Parameter(torch.full((3, 2) if kind == "swapped" else (2, 3), two))
        if kind == "tied":
            self.b = self.a
        elif kind == "view":
            self.b.data = self.a.data
        elif kind == "swapped":
            self.b.data = self.a.data.T


@pytest.mark.parametrize("kind", ["tied", "view", "swapped"])
def test_two_tensors_load_into_a_tied_one_only_if_their_bytes_are_equal(
    kind: str, tmp_path: Path
) -> None:
    """G15. Method: parameters that are one object, share memory, or share it with dims swapped;
    equal copies load, others are refused and nothing changes."""
    shapes = "swapped" if kind == "swapped" else "apart"

    def stored(name: str, one: float, two: float) -> Path:
        apart = Pair(kind, one, two)
        apart.b = nn.Parameter(torch.full((3, 2) if shapes == "swapped" else (2, 3), two))
        holdfast.save(tmp_path / name, {"m": apart})
        return tmp_path / name

    live = Pair(kind, 9.0, 9.0)
    holdfast.load(stored("equal", 2.0, 2.0), {"m": live})
    assert (live.a == 2).all()
    with pytest.raises(MismatchError, match=r"`m\.a` and `m\.b` are one tensor here, and two that"):
        holdfast.load(stored("apart", 3.0, 4.0), {"m": live})
    assert (live.a == 2).all()
    live = Pair(kind, 5.0, 5.0)
    holdfast.save(tmp_path / "tied", {"m": live})
    again = Pair(kind, 0.0, 0.0)
    holdfast.load(tmp_path / "tied", {"m": again})
    assert (again.a == 5).all()
