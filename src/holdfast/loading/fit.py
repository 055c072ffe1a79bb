"""Check that numbers fit the dtype that they are loaded as."""

from __future__ import annotations

import math
from functools import cache

import torch

from holdfast import accelerator
from holdfast.errors import MismatchError


def needs_check(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a load from dtype `stored` to `wanted` must check every number by `fits`, before any
    state is changed. It must if `wanted` is the dtype of scales (float8_e8m0fnu), or if one of the
    two is an integer dtype and `wanted` cannot represent all numbers of `stored`. Few tensors of a
    state have such dtypes, so the check costs little.

    >>> needs_check(torch.int64, torch.int32), needs_check(torch.int64, torch.float32)
    (True, True)
    >>> needs_check(torch.int32, torch.int64), needs_check(torch.float32, torch.float16)
    (False, False)
    """
    if stored == wanted:
        return False
    if _is_scale(wanted):
        return True
    if stored == torch.bool:
        return False
    if not _is_integer(stored):
        return _is_integer(wanted)
    low, high = torch.iinfo(stored).min, torch.iinfo(stored).max
    if _is_integer(wanted):
        return low < torch.iinfo(wanted).min or high > torch.iinfo(wanted).max
    # A float represents all integers up to 2 / eps.
    return high > 2 / torch.finfo(wanted).eps


def unfit_line(name: str, wanted: torch.dtype) -> str:
    """Return the line about tensor `name` for an error, if `fits` is false."""
    return f"`{name}` holds numbers in the checkpoint that {wanted} cannot represent"


def fits(numbers: torch.Tensor, wanted: torch.dtype) -> bool:
    """Whether `wanted` represents each of these numbers exactly."""
    converted = _comparable(numbers.to(wanted))
    converted = converted.real if wanted.is_complex else converted
    numbers = _comparable(numbers)
    back = converted.to(numbers.dtype)
    same = (back == numbers) | ((back != back) & (numbers != numbers))
    if _is_scale(wanted):
        # 0 is converted to the smallest scale. If this is converted back to a dtype that cannot
        # represent it, it rounds to 0, so the comparison above finds no difference.
        same &= (converted != torch.finfo(wanted).tiny) | (numbers != 0)
    if _is_integer(wanted) and _is_integer(numbers.dtype):
        # A number too large for a signed dtype becomes negative. Converted back, it is the same
        # number, so the comparison above finds no difference.
        same &= _is_negative(converted) == _is_negative(numbers)
    return bool(same.all())


def put(target: torch.Tensor, numbers: torch.Tensor, name: str, *, blocking: bool = True) -> None:
    """Copy numbers to `target`, converted to its dtype. Without `blocking`, the caller must not
    change `numbers` until the copy in the current stream has ended.

    Raises:
        MismatchError: a number is too large for that dtype.
    """
    queued = not blocking and accelerator.has_streams(target.device)
    target.copy_(numbers, non_blocking=queued)
    if target.dtype != numbers.dtype and _overflows(target, numbers):
        raise MismatchError(
            f"`{name}` is {numbers.dtype} in the checkpoint, and holds numbers beyond the range of "
            f"the {target.dtype} that is wanted; the state is loaded in part",
            hint=f"load it into a tensor of {numbers.dtype}",
        )


def _overflows(target: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether any of `numbers` was too large for the dtype of `target`, to which they have been
    copied."""
    wanted = target.dtype
    if _is_integer(wanted) or _is_integer(numbers.dtype):
        return False
    if wanted.itemsize == 1:
        # Casts to one byte saturate or give NaN, so an overflow does not show in them.
        numbers = _comparable(numbers)
        too_large = numbers.abs() >= _overflow_limit(wanted)
        return bool((too_large & numbers.isfinite() if _has_infinity(wanted) else too_large).any())
    if torch.finfo(wanted).max >= torch.finfo(numbers.dtype).max:
        return False
    return bool((target.isinf() & _comparable(numbers).isfinite().to(target.device)).any())


@cache
def _overflow_limit(dtype: torch.dtype) -> float:
    """Return the smallest number that overflows: the largest number of `dtype` plus half a unit in
    its last place."""
    largest = torch.finfo(dtype).max
    return largest + math.ldexp(torch.finfo(dtype).eps, math.frexp(largest)[1] - 2)


@cache
def _has_infinity(dtype: torch.dtype) -> bool:
    return bool(torch.tensor(math.inf).to(dtype).float().isinf())


def _comparable(numbers: torch.Tensor) -> torch.Tensor:
    """Convert one-byte floats to float32, since torch has few operators for them. Return other
    numbers unchanged."""
    small = numbers.is_floating_point() and numbers.dtype.itemsize == 1
    return numbers.float() if small else numbers


def _is_negative(numbers: torch.Tensor) -> torch.Tensor:
    # Unsigned numbers are never negative. Torch cannot compare the wide ones, so do not ask it.
    if numbers.dtype == torch.bool or torch.iinfo(numbers.dtype).min == 0:
        return torch.zeros_like(numbers, dtype=torch.bool)
    return numbers < 0


def _is_scale(dtype: torch.dtype) -> bool:
    """Whether the dtype is for scales of quantized weights: it has only positive powers of two."""
    return dtype == torch.float8_e8m0fnu


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)
