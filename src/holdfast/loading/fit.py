"""Numbers that are loaded as another dtype: whether each of them has a place there."""

from __future__ import annotations

import math
from functools import cache

import torch

from holdfast.errors import MismatchError


def is_narrowed(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a whole number of `stored` may be none of `wanted`, or a number of `stored` no whole
    one. Such tensors are few and small: they are read aside, and checked before anything changes.

    >>> is_narrowed(torch.int64, torch.int32), is_narrowed(torch.int64, torch.float32)
    (True, True)
    >>> is_narrowed(torch.int32, torch.int64), is_narrowed(torch.float32, torch.float16)
    (False, False)
    """
    if stored == wanted:
        return False
    if _is_scale(wanted):
        return True
    if stored == torch.bool:
        return False
    if not _is_whole(stored):
        return _is_whole(wanted)
    low, high = torch.iinfo(stored).min, torch.iinfo(stored).max
    if _is_whole(wanted):
        return low < torch.iinfo(wanted).min or high > torch.iinfo(wanted).max
    # All whole numbers up to 2 / eps are floats.
    return high > 2 / torch.finfo(wanted).eps


def fits(numbers: torch.Tensor, wanted: torch.dtype) -> bool:
    """Whether each of these numbers is one of `wanted`."""
    made = _comparable(numbers.to(wanted))
    made = made.real if wanted.is_complex else made
    numbers = _comparable(numbers)
    back = made.to(numbers.dtype)
    same = (back == numbers) | ((back != back) & (numbers != numbers))
    if _is_scale(wanted):
        # The smallest scale, which stands in for 0 and is none, is 0 again in a small dtype.
        same &= (made != torch.finfo(wanted).tiny) | (numbers != 0)
    if _is_whole(wanted) and _is_whole(numbers.dtype):
        # What is too large for a signed dtype becomes negative there, and itself on its way back.
        same &= _is_negative(made) == _is_negative(numbers)
    return bool(same.all())


def _is_negative(numbers: torch.Tensor) -> torch.Tensor:
    # Torch compares no wide unsigned integers.
    if numbers.dtype == torch.bool or torch.iinfo(numbers.dtype).min == 0:
        return torch.zeros_like(numbers, dtype=torch.bool)
    return numbers < 0


def put(target: torch.Tensor, numbers: torch.Tensor, name: str) -> None:
    """Copy numbers to their place, as its dtype.

    Raises:
        MismatchError: one of them is beyond the range of that dtype.
    """
    target.copy_(numbers)
    if target.dtype != numbers.dtype and _is_beyond(target, numbers):
        raise MismatchError(
            f"`{name}` is {numbers.dtype} in the checkpoint, and holds numbers beyond the range of "
            f"the {target.dtype} that is wanted; the state is loaded in part",
            hint="load it as another dtype",
        )


def _is_beyond(target: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether a number is larger than any of the target's dtype."""
    wanted = target.dtype
    if _is_whole(wanted) or _is_whole(numbers.dtype):
        return False
    if wanted.itemsize == 1:
        # Casts to these saturate or give NaN, so the result tells nothing.
        numbers = _comparable(numbers)
        beyond = numbers.abs() >= _limit(wanted)
        return bool((beyond & numbers.isfinite() if _has_infinity(wanted) else beyond).any())
    if torch.finfo(wanted).max >= torch.finfo(numbers.dtype).max:
        return False
    return bool((target.isinf() & _comparable(numbers).isfinite().to(target.device)).any())


@cache
def _limit(dtype: torch.dtype) -> float:
    """Smallest number that rounds to one above the largest of `dtype`: half a step above that."""
    largest = torch.finfo(dtype).max
    return largest + math.ldexp(torch.finfo(dtype).eps, math.frexp(largest)[1] - 2)


@cache
def _has_infinity(dtype: torch.dtype) -> bool:
    return bool(torch.tensor(math.inf).to(dtype).float().isinf())


def _comparable(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers as a dtype that has all operators: floats of one byte have hardly any."""
    small = numbers.is_floating_point() and numbers.dtype.itemsize == 1
    return numbers.float() if small else numbers


def _is_scale(dtype: torch.dtype) -> bool:
    """Whether a dtype holds powers of two alone, neither 0 nor a sign: scales of others."""
    return dtype == torch.float8_e8m0fnu


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)
