"""Which values are read back before they are written, and which need not be."""

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
def test_what_need_not_be_tried_reads_back_equal(value: Any) -> None:
    """G12. Method: any plain value, as torch reads it without running code."""
    if reads_back(value):
        container = encode_value("value", value)
        assert torch.load(io.BytesIO(container), weights_only=True) == value


NEAR = st.sampled_from([0, 0.0, -0.0, False, 1, True, 1.0, "1", "a", None, 2**70])
MEMBERS = st.lists(NEAR, max_size=3)
NEARLY_EQUAL = NEAR | st.lists(NEAR | MEMBERS | MEMBERS.map(tuple), max_size=3).map(tuple)


@given(st.lists(NEARLY_EQUAL, max_size=8))
def test_a_container_that_is_kept_is_that_of_the_very_value(values: list[Any]) -> None:
    """G6. Method: values that are equal, or nearly, one after the other."""
    containers = Containers()
    for value in values:
        assert containers.of("value", value) == encode_value("value", value)


def test_the_state_of_random_numbers_need_not_be_tried_and_objects_must() -> None:
    """G12. Method: also an object inside of plain values, and a list that holds itself."""
    assert reads_back(random.getstate())
    endless: list[Any] = []
    endless.append(endless)
    for other in (PurePosixPath("a"), [{"a": (1, PurePosixPath("b"))}], {1: 2}, 1 << 64, endless):
        assert not reads_back(other)
    with pytest.raises(UsageError, match=r"`value\[0\]\['a'\]\[1\]` is a object"):
        encode_value("value", [{"a": (1, object())}])
