"""Values that must be read back before they are written, and values that need not be."""

from __future__ import annotations

import io
import random
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.state.values import Containers, encode_value, reads_back

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda members: (
        st.lists(members)
        | st.lists(members).map(tuple)
        | st.dictionaries(st.text(), members, max_size=5)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_values_that_need_not_be_tried_read_back_equal(value: Any) -> None:
    """G12. Method: any plain value, read by torch without running code."""
    if reads_back(value):
        container = encode_value("value", value)
        assert torch.load(io.BytesIO(container), weights_only=True) == value


NEAR = st.sampled_from([0, 0.0, -0.0, False, 1, True, 1.0, "1", "a", None, 2**70])
MEMBERS = st.lists(NEAR, max_size=3)
NEARLY_EQUAL = NEAR | st.lists(NEAR | MEMBERS | MEMBERS.map(tuple), max_size=3).map(tuple)


@given(st.lists(NEARLY_EQUAL, max_size=8))
def test_a_cached_container_is_that_of_the_same_value(values: list[Any]) -> None:
    """G6. Method: equal and nearly equal values, one after the other."""
    containers = Containers()
    for value in values:
        assert containers.of("value", value) == encode_value("value", value)


def test_random_state_need_not_be_tried_and_objects_must() -> None:
    """G12. Method: also an object inside plain values, and a list that contains itself."""
    assert reads_back(random.getstate())
    endless: list[Any] = []
    endless.append(endless)
    for other in (PurePosixPath("a"), [{"a": (1, PurePosixPath("b"))}], {1: 2}, 1 << 64, endless):
        assert not reads_back(other)
    with pytest.raises(UsageError, match=r"`value\[0\]\['a'\]\[1\]` is an object"):
        encode_value("value", [{"a": (1, object())}])


HUGE = 10**5000
LARGEST = 2**2039 - 1


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (HUGE, "value"),
        (-HUGE, "value"),
        (LARGEST + 1, "value"),
        ([1, [HUGE]], "value[1][0]"),
        ((1, HUGE), "value[1]"),
        ({"a": (HUGE,)}, "value['a'][0]"),
        ([{HUGE}], "value[0] (a member)"),
        (({HUGE: object()},), "value[0] (a key)"),
    ],
    ids=["int", "negative", "smallest", "list", "tuple", "dict", "set", "key"],
)
def test_an_integer_that_torch_cannot_read_is_named(value: Any, where: str) -> None:
    """Method: integers beyond the 4,300 digits that Python formats, and the smallest that
    `torch.load` refuses. The message does not ask the user to report a bug."""
    with pytest.raises(UsageError) as raised:
        Containers().of("value", value)
    assert raised.value.what.startswith(f"`{where}` is an int of ")
    assert "bits, expected at most 2,039" in raised.value.what
    assert "hex(number)" in str(raised.value.hint)


def test_the_largest_integer_reads_back() -> None:
    for value in (LARGEST, -LARGEST, [LARGEST]):
        container = Containers().of("value", value)
        assert torch.load(io.BytesIO(container), weights_only=True) == value
