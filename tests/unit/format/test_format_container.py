"""Values of a checkpoint displayed without torch, and without running code."""

from __future__ import annotations

import io
import json
import random
import time
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import FormatError
from holdfast.format.container import as_json, read_value, spelled


def container(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read(value: Any) -> object:
    return read_value(container(value), where="here")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(plain)
def test_plain_values_are_displayed_like_repr(value: Any) -> None:
    """Method: numbers, texts, bytes and containers of them, compared with `repr`."""
    result = read(value)
    # An empty bytes is a call in the pickles of torch.save.
    if "b''" not in repr(value) and len(repr(value)) < 500:
        assert spelled(result) == repr(value)
    json.dumps(as_json(result, 10_000))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.float32, "torch.float32"),
        (torch.device("cpu"), "torch.device('cpu')"),
        (torch.Size([2, 3]), "(2, 3)"),
        ((1, torch.ones(2)), "(1, tensor of float32 [2])"),
        ({1}, "{1}"),
        (set(), "set()"),
        (1 + 2j, "(1+2j)"),
        (OrderedDict(a=1), "{'a': 1}"),
        (Counter("aa"), "collections.Counter({'a': 2})"),
        (10**5000, "a number of 16610 bits"),
        ({(1, 2): None}, "{(1, 2): None}"),
        ([], "[]"),
        ((1,), "(1,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objects_that_need_torch_are_named(value: Any, said: str) -> None:
    """Method: the other kinds of values in checkpoints."""
    result = read(value)
    assert spelled(result) == said
    json.dumps(as_json(result, 100))


def test_long_shared_and_cyclic_values_are_displayed_quickly() -> None:
    """G8. Method: the state of Python's random generator, lists that double at each level, lists
    forty wide and ten levels deep, and lists that contain themselves."""
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    doubled: list[Any] = [1]
    wide: list[Any] = [1] * 40
    for _ in range(50):
        doubled = [doubled, doubled]
        wide = [wide] * 40
    started = time.monotonic()
    for value in (random.getstate(), cyclic, doubled, wide, "x" * 10**6):
        assert len(spelled(read(value))) < 2100
    for value in (cyclic, doubled, wide):
        with pytest.raises(FormatError, match="or contains itself"):
            as_json(read(value), 1000)
    assert time.monotonic() - started < 5
    assert "585 more" in spelled(read(random.getstate()))


def test_displaying_a_value_runs_no_code(tmp_path: Any) -> None:
    """G8. Method: a pickle that would run a command."""

    class Attack:
        def __reduce__(self) -> Any:
            import os

            return os.system, (f"touch {tmp_path}/ran",)

    assert spelled(read(Attack())) == f"posix.system('touch {tmp_path}/ran')"
    assert not (tmp_path / "ran").exists()


def test_a_container_that_ends_early_is_refused() -> None:
    """Method: the first 100 bytes of one."""
    with pytest.raises(FormatError, match="is no container of torch"):
        read_value(container({"epoch": 3})[:100], where="cut")
