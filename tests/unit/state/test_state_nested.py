"""Objects in the caller's containers, and in the state of other objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import MismatchError
from holdfast.state.same import differences, same
from kept import Kept


def container_of(kind: str, model: Any, optimizer: Any) -> Any:
    """Return a container with a module and an optimizer in it."""
    return {
        "dict": {"m": model, "o": optimizer},
        "list": [model, optimizer],
        "tuple": (model, optimizer, 7, torch.ones(1)),
        "dict in list": [{"m": model, "o": optimizer}],
        "list in list": [[model, optimizer], 1],
        "dict in lists": [[{"m": model, "o": optimizer}]],
        "tuple in dict": {"a": (model, optimizer), "n": 3},
        "beside a tensor": [torch.ones(1), {"m": model}, ("x", {"o": [optimizer]})],
    }[kind]


NESTED = (
    "dict",
    "list",
    "tuple",
    "dict in list",
    "list in list",
    "dict in lists",
    "tuple in dict",
    "beside a tensor",
)


@pytest.mark.parametrize("kind", NESTED)
def test_objects_in_any_container_are_filled_in_place(kind: str, tmp_path: Path) -> None:
    """G15. Method: a module and an optimizer with slots, beside values in dicts, lists and tuples,
    two and three levels deep; loaded into containers with fresh objects and other values."""

    def made(number: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, number)
        return model, torch.optim.SGD(model.parameters(), lr=number, momentum=0.5)

    model, optimizer = made(5.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    holdfast.save(tmp_path / "one", {"s": container_of(kind, model, optimizer)})
    names = holdfast.open(tmp_path / "one").manifest.tensors
    assert any(name.endswith("state.weight.momentum_buffer") for name in names), (
        "named by its model"
    )
    fresh, other = made(1.0)
    state: dict[str, Any] = {"s": container_of(kind, fresh, other)}
    if kind == "tuple":
        state["s"] = (*state["s"][:2], 0, torch.zeros(1))
    holdfast.load(tmp_path / "one", state)
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())
    if kind == "tuple":
        assert same(state["s"][2:], (7, torch.ones(1)))
    assert [*differences(container_of(kind, 0, 0), _without(state["s"], fresh, other))] == []


def _without(value: Any, *objects: Any) -> Any:
    """Replace the objects of a state by 0."""
    if any(value is one for one in objects):
        return 0
    if isinstance(value, dict):
        return {key: _without(one, *objects) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without(one, *objects) for one in value)
    return value


@pytest.mark.parametrize("saved", [5, None, [1], "text", (1, 2), {"x": 1}, torch.ones(1)])
def test_a_live_object_or_tensor_is_never_replaced_by_something_else(
    saved: Any, tmp_path: Path
) -> None:
    """G15. Method: values of all kinds, stored in the place of a container with an object at any
    depth, or of a dict with a tensor: refused by name, nothing changes."""
    model = torch.nn.Linear(1, 1)
    holdfast.save(tmp_path / "one", {"a": saved, "z": torch.ones(1)})
    for live in ({"m": model}, [model], (model, 1), [[{"m": (model,)}]], {"t": torch.zeros(1)}):
        state: dict[str, Any] = {"a": live, "z": torch.zeros(1)}
        with pytest.raises(MismatchError, match=r"nothing was changed:(.|\n)*`a[.`]"):
            holdfast.load(tmp_path / "one", state)
        assert state["a"] is live
        assert not state["z"].any()


@pytest.mark.parametrize(
    "state", [{"a": 1}, {1: 2}, {"a": 1, "b": [2]}, {"a": torch.ones(2)}, 3, None, [1], (1, {2: 3})]
)
def test_an_object_in_the_state_of_another_is_restored_in_place(state: Any, tmp_path: Path) -> None:
    """G15. Method: in a dict, a list, a tuple, as the whole state, and one level deeper; every form
    of the inner state. The outer object gets the inner one itself, already loaded; if it contains
    no such object, the load is refused."""
    forms: dict[str, Any] = {
        "dict": lambda one: {"k": one},
        "list": lambda one: [1, one],
        "tuple": lambda one: (one, 2),
        "whole": lambda one: one,
        "deeper": lambda one: {"x": [Kept({"y": one, "n": 1})], "n": 2},
    }
    for name, form in forms.items():
        holdfast.save(tmp_path / name, {"o": Kept(form(Kept(state)))})
        inner = Kept()
        outer = Kept(form(inner))
        holdfast.load(tmp_path / name, {"o": outer})
        assert same(inner.state, state)
        found = outer.state["x"][0].state["y"] if name == "deeper" else outer.state
        assert (found if name in ("whole", "deeper") else next(_kept_in(found))) is inner
        with pytest.raises(MismatchError, match=r"`o[.\w]*` is an object in the checkpoint"):
            holdfast.load(tmp_path / name, {"o": Kept({"k": 5})})


def _kept_in(state: Any) -> Any:
    members = state.values() if isinstance(state, dict) else state
    return (one for one in members if isinstance(one, Kept))


class Table(dict[str, int]):
    """A dict with `state_dict` and `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        return {"items": [*self.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clear()
        self.update(state_dict["items"])


def test_a_dict_class_with_a_state_dict_is_an_object(tmp_path: Path) -> None:
    """G15. Method: at the top level, in a list, and in the state of an object."""
    holdfast.save(tmp_path / "one", {"t": Table(a=1), "l": [Table(b=2)], "o": Kept([Table(c=3)])})
    top, inside, deep = Table(x=0), Table(), Table()
    holdfast.load(tmp_path / "one", {"t": top, "l": [inside], "o": Kept([deep])})
    assert (top, inside, deep) == ({"a": 1}, {"b": 2}, {"c": 3})


@pytest.mark.parametrize("kind", [list, tuple])
def test_parameters_in_a_list_are_filled_in_place(kind: Any, tmp_path: Path) -> None:
    """G6, G15. Method: `list(model.parameters())`, which nobody reads again after the load: with
    another dtype the parameters are filled; another shape or number is refused."""
    saved = torch.nn.Linear(2, 2)
    holdfast.save(tmp_path / "one", {"p": kind(saved.parameters())})
    model = torch.nn.Linear(2, 2).double()
    loaded = holdfast.load(tmp_path / "one", {"p": kind(model.parameters())})
    assert torch.equal(model.weight, saved.weight.double())
    assert kind is tuple or loaded.converted == ("p.0", "p.1")
    refused = r"expected \[3, 2\]|has 2 members|expected \['a tensor"
    for other in (torch.nn.Linear(2, 3), torch.nn.Linear(2, 2, bias=False)):
        before = other.weight.detach().clone()
        with pytest.raises(MismatchError, match=refused):
            holdfast.load(tmp_path / "one", {"p": kind(other.parameters())})
        assert torch.equal(other.weight, before)


def test_new_tensors_in_a_list_are_said(tmp_path: Path) -> None:
    """G6. Method: a list of plain tensors, saved with another shape."""
    holdfast.save(tmp_path / "one", {"history": [torch.ones(3)]})
    state = {"history": [torch.zeros(2)]}
    loaded = holdfast.load(tmp_path / "one", state)
    assert same(state, {"history": [torch.ones(3)]})
    assert any("`history`: its tensors were replaced" in note for note in loaded.notes)
    assert not holdfast.load(tmp_path / "one", state).notes
