"""Checks the arguments of `holdfast.save`, `load` and `open` before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

from holdfast.arguments import checked_flag, checked_path, shown
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.paths import open_for_saving, open_parent
from holdfast.errors import UsageError
from holdfast.format.region import Region
from holdfast.storage.store import ReadStore


def place_to_save(path: object, state: object, *, overwrite: object) -> tuple[Catalog, str]:
    """Check the arguments of `holdfast.save`. Return the catalog of the folder above `path`, and
    the last part of `path`, which is the name of the checkpoint.

    Raises:
        UsageError: an argument has the wrong type, or `open_for_saving` rejects `path`.
    """
    text = _checked(path, state, "holdfast.save")
    checked_flag(overwrite, "overwrite")
    return open_for_saving(text)


def check_to_load(path: object, state: object, *, strict: object) -> tuple[ReadStore, str]:
    """Check the arguments of `holdfast.load`. Return the store of the folder above `path`, and the
    last part of `path`, which is the name of the checkpoint. Raises a UsageError if an argument has
    the wrong type."""
    text = _checked(path, state, "holdfast.load")
    if isinstance(state, Mapping) and not isinstance(state, MutableMapping):
        raise UsageError(f"`state` must be a dict, which is filled in place, found: {shown(state)}")
    checked_flag(strict, "strict")
    return open_parent(text)


def _checked(path: object, state: object, function: str) -> str:
    """Check the types of `path` and `state`. Return `path` as a string. `function`: name of the
    public function, for messages."""
    if isinstance(state, str | os.PathLike) and not isinstance(path, str | os.PathLike):
        raise UsageError(
            f"`path` must be a path, found: {shown(path)}; `state` must be a dict, found: "
            f"{shown(state)}",
            hint=f"the path comes first: {function}(path, state)",
        )
    text = checked_path(path, "path")
    # A module passes this check. `StateTree` decides later whether a module can be a state.
    if not isinstance(state, Mapping) and not hasattr(state, "state_dict"):
        raise UsageError(
            "`state` must be a dict of tensors, values and objects by name, or a module, found: "
            f"{shown(state)}",
            hint=f'{function}(path, {{"model": model, "step": 7}})',
        )
    return text


def region_of(name: object, shape: tuple[int, ...], region: object) -> Region:
    """Convert the `region` that a user wants to read from tensor `name` to a `Region`. The user may
    pass a `Region`, slices, or None for the whole tensor. Raises a UsageError for another type, or
    for a region outside of the tensor."""
    if region is None:
        return Region.whole(shape)
    if not isinstance(region, Region):
        region = _region_of_slices(name, shape, region)
    if not region.fits(shape):
        raise UsageError(f"{region} is outside of `{name}` of shape {list(shape)}")
    return region


def _region_of_slices(name: object, shape: tuple[int, ...], region: object) -> Region:
    slices = [region] if isinstance(region, slice) else region
    if not isinstance(slices, list | tuple) or not all(isinstance(s, slice) for s in slices):
        found = shown(region)
        if isinstance(slices, list | tuple):
            found = next(shown(item) for item in slices if not isinstance(item, slice))
        raise UsageError(
            f"`region` must be a `Region`, or a slice for each dim, found: {found}",
            hint=f'read("{name}", (slice(0, 2),)) reads the first two rows',
        )
    if len(slices) > len(shape) or any(item.step not in (None, 1) for item in slices):
        raise UsageError(f"`{name}` of shape {list(shape)} has no region {region}")
    try:
        bounds = [item.indices(size) for item, size in zip(slices, shape, strict=False)]
    except TypeError as error:
        raise UsageError(f"`region` must have whole numbers in its slices: {error}") from error
    bounds += [(0, size, 1) for size in shape[len(slices) :]]
    return Region(tuple(b[0] for b in bounds), tuple(max(b[0], b[1]) for b in bounds))
