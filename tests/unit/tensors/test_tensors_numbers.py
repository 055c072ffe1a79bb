"""Conversion between dtypes, compared with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import UsageError
from holdfast.tensors.numbers import convert, floats

EDGES = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    65504.0,
    65520.0,
    6e-8,
    1e-45,
    3.4e38,
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements as integers, with one kind of NaN."""
    quiet = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return quiet.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float64", "float32", "float16", "bfloat16"])
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_conversion_rounds_as_torch_does(source: str, target: str, drawn: list[float]) -> None:
    """Method: bit by bit, on drawn numbers and the edges of each dtype."""
    numbers = torch.tensor([*drawn, *EDGES], dtype=torch.float64).to(getattr(torch, source))
    wanted = numbers.to(getattr(torch, target))
    found = torch.from_numpy(convert(as_numpy(numbers), source, target).copy())
    assert torch.equal(bits(found.view(wanted.dtype)), bits(wanted))


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"],
)
def test_every_byte_of_an_8_bit_float_has_the_value_of_torch(dtype: str) -> None:
    """Method: all 256 bytes."""
    every = torch.arange(256, dtype=torch.uint8)
    wanted = every.view(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(floats(every.numpy(), dtype), wanted)


def test_an_unsupported_conversion_is_refused() -> None:
    with pytest.raises(UsageError, match="int64 to bfloat16"):
        convert(np.arange(3), "int64", "bfloat16")
