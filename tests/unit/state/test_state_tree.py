"""Nested state as flat names: those of stock DCP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from holdfast.errors import UsageError
from holdfast.state.tree import Leaf, flatten, place

KEYS = st.sampled_from(["a", "b", "a.b", "0", "", "weight", "exp_avg"]) | st.integers(0, 2)
LEAVES = st.builds(lambda: torch.zeros(1)) | st.none() | st.integers() | st.text(max_size=3)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(KEYS, inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def spelled_alike(value: Any) -> bool:
    """Whether two keys of one dict, at a place that is entered, have the same text."""
    if isinstance(value, dict):
        alike = len({*map(str, value)}) < len(value)
        return alike or any(map(spelled_alike, value.values()))
    return isinstance(value, list) and any(map(spelled_alike, value))


@given(STATES)
def test_names_paths_and_leaves_are_those_of_stock_dcp(state: dict[Any, Any]) -> None:
    """G10. Method: stock's own `flatten_state_dict` on generated state: lists, tuples, dicts with
    dotted and numeric keys, empty ones. Where stock refuses two entries of one name, so do we;
    and where `0` stands beside `"0"`, which stock takes for one on the way back."""
    if spelled_alike(state):
        with pytest.raises(UsageError, match=r"spelled alike|two entries"):
            flatten(state)
        return
    try:
        expected, paths = flatten_state_dict(state)
    except ValueError:
        with pytest.raises(UsageError, match="two entries have the name"):
            flatten(state)
        return
    found = flatten(state)
    assert [*found] == [*expected]
    for name, leaf in found.items():
        assert leaf.value is expected[name]
        assert leaf.path == paths[name]


@given(STATES)
def test_a_value_is_put_back_where_it_was_found(state: dict[Any, Any]) -> None:
    """G6. Method: every leaf of a copy replaced by a tensor of its own, then all found again."""
    try:
        leaves = flatten(state)
    except UsageError:
        return
    target = copy.deepcopy(state)
    marks = {name: torch.tensor(number) for number, name in enumerate(leaves)}
    for name, leaf in leaves.items():
        place(target, leaf.path, marks[name])
    again = flatten(target)
    assert [*again] == [*leaves]
    assert all(leaf.value is marks[name] for name, leaf in again.items())


def test_an_object_may_be_opened_into_a_dict_and_is_then_entered() -> None:
    """Method: an object at a depth; its path is given to the one who opens."""
    marker = object()
    seen = []

    def opened(path: tuple[str | int, ...], value: Any) -> Any:
        seen.append(path)
        return {"x": 1} if value is marker else value

    found = flatten({"a": {"b": marker}, "c": 2}, opened=opened)
    assert {name: leaf.value for name, leaf in found.items()} == {"a.b.x": 1, "c": 2}
    assert ("a", "b") in seen


def test_two_entries_of_one_name_are_refused_with_both_paths() -> None:
    """G6. Method: a dotted key beside a dict."""
    with pytest.raises(UsageError, match=r"`a\.b`") as refused:
        flatten({"a.b": 1, "a": {"b": 2}})
    assert "('a.b',)" in refused.value.what
    assert "('a', 'b')" in refused.value.what


def test_a_leaf_keeps_the_very_object() -> None:
    """Method: identity; a tensor is not copied."""
    tensor = torch.zeros(3)
    leaf = flatten({"w": tensor})["w"]
    assert isinstance(leaf, Leaf)
    assert leaf.value is tensor
