"""Numbers loaded as another dtype are represented exactly, or the load fails."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import MismatchError
from holdfast.format.dtypes import BY_NAME

NUMBERS = (
    0,
    1,
    -1,
    3,
    17,
    255,
    500,
    65_536,
    2**31,
    2**62,
    460.0,
    465.0,
    250.0,
    61_000.0,
    1e5,
    1e30,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
)


def holds(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each number that a dtype can hold, as a tensor."""
    found = {}
    for number in NUMBERS:
        try:
            tensor = torch.tensor([number], dtype=torch.float64).to(dtype)
        except (RuntimeError, OverflowError):
            continue
        if same(tensor, torch.tensor([number])):
            found[str(number)] = tensor
    return found


def same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two numbers are equal up to rounding."""
    one, two = of_any(tensor), of_any(other)
    if math.isnan(one) or math.isinf(one):
        return one == two or (math.isnan(one) and math.isnan(two))
    return math.isclose(one, two, rel_tol=0.13)


def of_any(tensor: torch.Tensor) -> float:
    found: Any = (tensor.float() if tensor.element_size() == 1 else tensor).item()
    return float(found.real)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("stored", [name for name in BY_NAME if "x2" not in name])
def test_a_number_of_any_dtype_fits_any_other_or_is_refused(stored: str, tmp_path: Path) -> None:
    """G15. Method: numbers at and beyond the range of every dtype, loaded into every other dtype
    that torch can cast to. The target has the number, rounded, or the load is
    refused."""
    state = holds(getattr(torch, stored))
    holdfast.save(tmp_path / "x", state)
    for wanted, (name, tensor) in product(BY_NAME, state.items()):
        dtype = getattr(torch, wanted)
        if "x2" in wanted or not torch.can_cast(tensor.dtype, dtype):
            continue
        target = {name: torch.ones(1).to(dtype)}
        try:
            holdfast.load(tmp_path / "x", target)
        except MismatchError:
            continue
        assert same(target[name], tensor), f"{name} as {wanted}: {target[name]}"


@pytest.mark.parametrize("number", [500.0, 1e30, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_a_cast_that_saturates_is_refused(number: float, dtype: Any, tmp_path: Path) -> None:
    """G15. Method: dtypes whose casts turn larger numbers into the largest one or NaN;
    the largest itself fits."""
    largest = torch.finfo(dtype).max
    holdfast.save(tmp_path / "x", {"fits": torch.tensor([largest]), "not": torch.tensor([number])})
    target = {"fits": torch.zeros(1).to(dtype)}
    holdfast.load(tmp_path / "x", target)
    assert target["fits"].item() == largest
    with pytest.raises(MismatchError, match="beyond the range"):
        holdfast.load(tmp_path / "x", {"not": torch.zeros(1).to(dtype)})
