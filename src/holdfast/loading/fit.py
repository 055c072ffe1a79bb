"""Numbers that are loaded as another dtype: whether each of them has a place there."""

from __future__ import annotations

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
    if stored == wanted or stored == torch.bool:
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
    made = numbers.to(wanted)
    return torch.equal(made.to(numbers.dtype), numbers) and torch.equal(made < 0, numbers < 0)


def put(target: torch.Tensor, numbers: torch.Tensor, name: str) -> None:
    """Copy numbers to their place, as its dtype.

    Raises:
        MismatchError: one of them is beyond the range of that dtype.
    """
    target.copy_(numbers)
    if (
        target.dtype != numbers.dtype
        and target.is_floating_point()
        and _has_new_infinity(target, numbers)
    ):
        raise MismatchError(
            f"`{name}` is {numbers.dtype} in the checkpoint, and holds numbers beyond the range of "
            f"the {target.dtype} that is wanted; the state is loaded in part",
            hint="load it as another dtype",
        )


def _has_new_infinity(target: torch.Tensor, numbers: torch.Tensor) -> bool:
    if not numbers.is_floating_point():
        return False
    if torch.finfo(target.dtype).max >= torch.finfo(numbers.dtype).max:
        return False
    if target.dtype.itemsize == 1:
        # Infinity and NaN are one in most of these.
        return bool((~target.float().isfinite()).any()) and bool(numbers.isfinite().all())
    return bool((target.isinf() & numbers.isfinite().to(target.device)).any())


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)
