"""State that cannot be saved is refused by name; equal names get distinct prefixes."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import UsageError
from holdfast.state.same import same


class Odd(nn.Linear):
    """A module whose `state_dict()` returns anything."""

    given: Any = None

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return self.given


@pytest.mark.parametrize(
    "given", [None, (1,), [1], {5: torch.ones(1)}, {("a", 1): torch.ones(1)}, {"a": 1, None: 2}]
)
def test_a_module_without_a_dict_of_text_keys_is_named(given: Any, tmp_path: Path) -> None:
    """G15. Method: other types, other keys; at the save and at the load."""
    model = Odd(1, 1)
    holdfast.save(tmp_path / "one", {"m": nn.Linear(1, 1)})
    model.given = given
    for call in (holdfast.save, holdfast.load):
        where = tmp_path / ("two" if call is holdfast.save else "one")
        with pytest.raises(UsageError, match=r"`state_dict\(\)` of the module Odd must return"):
            call(where, {"m": model})


@pytest.mark.parametrize("dtype", [torch.bits8, torch.int4])  # type: ignore[attr-defined]
@pytest.mark.parametrize("shape", [0, 2])
def test_a_tensor_of_an_unsupported_dtype_is_named(
    dtype: torch.dtype, shape: int, tmp_path: Path
) -> None:
    """G15. Method: with elements and without."""
    state = {"w": {"q": torch.empty(shape, dtype=dtype)}}
    with pytest.raises(UsageError, match=rf"`w\.q` is a tensor of {dtype}"):
        holdfast.save(tmp_path / "one", state)


def test_an_error_of_torchs_own_state_dict_is_shown(tmp_path: Path) -> None:
    """G15. Method: Adam after the removal of a group, whose slots it keeps."""
    model = nn.Linear(2, 2)
    groups: list[Any] = [{"params": [model.weight]}, {"params": [model.bias]}]
    optimizer = torch.optim.Adam(groups)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    del optimizer.param_groups[1]
    with pytest.raises(UsageError, match=r"`Optimizer\.state_dict` raised KeyError"):
        holdfast.save(tmp_path / "one", {"m": model, "o": optimizer})


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    held = [one for group in optimizer.param_groups for one in group["params"]]
    for number, one in enumerate(held):
        one.grad = torch.full_like(one, number + 1.0)
    optimizer.step()
    return optimizer


def test_names_in_an_optimizer_of_several_modules_have_the_paths_of_the_modules(
    tmp_path: Path,
) -> None:
    """G15. Method: a generator and a critic whose parameters have the same names, in a dict and in
    a list; loaded with the parameters in another order. Optimizers of one module each use names
    without a prefix."""
    one, two, third = nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(2, 2)
    both = stepped(torch.optim.Adam([*one.parameters(), *two.parameters(), *third.parameters()]))
    single = stepped(torch.optim.Adam(one.parameters()))
    state = {"g": one, "more": [{"d": two}, third], "both": both, "single": single}
    holdfast.save(tmp_path / "one", state)
    names = holdfast.open(tmp_path / "one").manifest.tensors
    assert "both.state.g.weight.exp_avg" in names
    assert "both.state.more.0.d.bias.exp_avg" in names
    assert "single.state.weight.exp_avg" in names
    other = torch.optim.Adam([*third.parameters(), *two.parameters(), *one.parameters()])
    holdfast.load(tmp_path / "one", {**state, "both": other})
    for model in (one, two, third):
        for parameter in model.parameters():
            assert same(dict(other.state[parameter]), dict(both.state[parameter]))


def test_a_parameter_called_by_a_number_differs_from_one_of_no_module(tmp_path: Path) -> None:
    """G15. Method: a parameter `1` of a model, and as the second one a parameter of no module."""
    model = nn.ParameterDict({"1": torch.ones(2), "0": torch.ones(4)})
    foreign = nn.Parameter(torch.ones(3))
    optimizer = stepped(torch.optim.Adam([model["1"], foreign, model["0"]]))
    holdfast.save(tmp_path / "one", {"m": model, "o": optimizer})
    fresh = torch.optim.Adam([model["1"], foreign, model["0"]])
    holdfast.load(tmp_path / "one", {"m": model, "o": fresh})
    assert same(fresh.state_dict(), optimizer.state_dict())


HUGE = 10**5000
"""Integer with more digits than Python formats."""


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (HUGE, "a number of 16610 bits"),
        ((1, HUGE), "(1, a number of 16610 bits)"),
        (b"x" * 5000, "b'xxx"),
    ],
    ids=["int", "tuple", "bytes"],
)
def test_a_key_whose_text_is_too_long_is_named(key: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        holdfast.save(tmp_path / "checkpoint", {"table": {key: 1}})
    assert raised.value.what.startswith(f"a key of `table` is too long: {found}")
    assert "expected at most 4,096 characters" in raised.value.what


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter, lambda d: defaultdict(int, d)])
def test_a_dict_that_changes_during_a_save_is_named(kind: Any, tmp_path: Path) -> None:
    """Method: `state_dict` of an object in the dict deletes a later key, as another thread could.
    The save adds no key to a defaultdict."""

    class Deletes:
        def state_dict(self) -> dict[str, Any]:
            del table["later"]
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise AssertionError(state)

    table = kind({"first": Deletes(), "later": 1})
    with pytest.raises(UsageError) as raised:
        holdfast.save(tmp_path / "checkpoint", {"run": {"table": table}})
    what = "the dict `run.table` changed during the save: its key 'later' is gone"
    assert raised.value.what == what
    assert "later" not in table
