"""Finds the checkpoint to resume from. Runs on one rank, which sends the result to the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace

from holdfast.catalog.catalog import Catalog, check_whole, read_index
from holdfast.catalog.marks import damaged_steps, mark_damaged, pinned_steps
from holdfast.catalog.open_any import open_any
from holdfast.catalog.resumable import misnumbered, why_not_resumable
from holdfast.catalog.steady import LOOKS_MAX, fingerprint
from holdfast.errors import HoldfastError, MismatchError, NotFoundError, StorageError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest
from holdfast.format.names import MANIFEST, step_name
from holdfast.manager.policy import Candidate

logger: logging.Logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class ResumableStep:
    """A checkpoint that a run can resume from."""

    step: int
    folder: str
    manifest: Manifest
    fingerprint: object = None
    """Fingerprint of the checkpoint when it was opened: see `steady.fingerprint`."""


def open_requested(catalog: Catalog, step: int) -> ResumableStep:
    """Open the checkpoint of a step that the user has requested, even if it is marked as damaged.

    Raises:
        MismatchError: the folder of this step holds another step.
    """
    folder = catalog.folders().get(step, "")
    before = fingerprint(catalog.store, folder) if folder else None
    manifest = catalog.open_step(step)
    if wrong := misnumbered(step, manifest):
        raise MismatchError(
            f"`{catalog.where(folder)}` is not step {step}: {wrong}",
            hint=f"load step {manifest.step} instead, or rename the folder to "
            f"`{step_name(manifest.step or 0)}`",
        )
    return ResumableStep(step, folder, manifest, before)


def newest_resumable(catalog: Catalog, below: int | None) -> tuple[ResumableStep | None, list[str]]:
    """Find the newest checkpoint that a run can resume from, older than step `below` if given.

    Returns it, and a line on each newer one that was refused. Data is not read here: loading checks
    it, and a load that fails leaves a mark, by which this function refuses the checkpoint.
    """
    refused: list[str] = []
    damaged = damaged_steps(catalog.store)
    for step in reversed(catalog.folders()):
        if below is not None and step >= below:
            continue
        opened: ResumableStep | HoldfastError | None = None
        if step not in damaged:
            try:
                opened = _open_steadily(catalog, step)
            except HoldfastError as error:
                if step not in catalog.folders():
                    continue  # The retention of another run deleted it after the listing.
                opened = error
        manifest = opened.manifest if isinstance(opened, ResumableStep) else opened
        why = why_not_resumable(step, manifest, damaged.get(step))
        if why is None and isinstance(opened, ResumableStep):
            return opened, refused
        refused.append(f"step {step}: {why}")
    return None, refused


def _open_steadily(catalog: Catalog, step: int) -> ResumableStep:
    """Open a checkpoint, again if another process replaces it meanwhile."""
    for left in reversed(range(LOOKS_MAX)):
        folder = catalog.folders().get(step, step_name(step))
        before = fingerprint(catalog.store, folder)
        try:
            return ResumableStep(step, folder, _manifest_of(catalog, folder), before)
        except HoldfastError:
            moved = catalog.folders().get(step) != folder
            if not left or not (moved or fingerprint(catalog.store, folder) != before):
                raise
    raise AssertionError("the last attempt returns or raises")


def mark_unless_store_failed(catalog: Catalog, step: int, error: HoldfastError) -> None:
    """Mark a checkpoint that failed to load as damaged, unless the store failed, which may work the
    next time."""
    if isinstance(error, NotFoundError | StorageError):
        return
    try:
        mark_damaged(catalog.store, step, error.what)
    except HoldfastError as failed:
        logger.warning("could not mark step %d as damaged: %s", step, failed)


def newest_final(catalog: Catalog) -> int | None:
    """The newest good step, if its checkpoint holds the model alone and is no seed; else None."""
    newest = next(good_steps(catalog, catalog.folders()), None)
    return newest.step if newest is not None and not newest.resumable else None


@dataclass(frozen=True, slots=True)
class CachedIndex:
    """Facts about a good checkpoint, cached until its index changes."""

    index: int
    """Checksum of the bytes of its index."""

    manifest: Manifest
    """Manifest without entries, of which there may be a million."""

    resumable: bool


def good_steps(
    catalog: Catalog,
    folders: Mapping[int, str],
    cache: MutableMapping[str, CachedIndex] | None = None,
) -> Iterator[Candidate]:
    """Yield the good ones of these checkpoints, newest first, for the retention rules.

    A good checkpoint has all of its files in full, has no mark `damaged`, and was saved as the step
    in its name. `cache` is filled, and saves decoding an index that has not changed; file sizes are
    checked in any case.
    """
    cache = {} if cache is None else cache
    for folder in cache.keys() - {*folders.values()}:
        del cache[folder]
    damaged, pinned = damaged_steps(catalog.store), pinned_steps(catalog.store)
    for step in sorted(folders.keys() - damaged.keys(), reverse=True):
        try:
            index = _cached(catalog, step, folders[step], cache)
        except HoldfastError:
            continue
        if not misnumbered(step, index.manifest):
            yield Candidate(step, index.resumable, index.manifest.metrics, step in pinned)


def _cached(
    catalog: Catalog, step: int, folder: str, cache: MutableMapping[str, CachedIndex]
) -> CachedIndex:
    index = 0
    with suppress(NotFoundError):
        index = checksum(read_index(catalog.store, f"{folder}/{MANIFEST}"))
    cached = cache.get(folder)
    if cached is not None and cached.index == index:
        check_whole(catalog.store, folder, cached.manifest)
        return cached
    manifest = _manifest_of(catalog, folder, entries=False)
    resumable = why_not_resumable(step, manifest) is None
    cached = CachedIndex(index, replace(manifest, tensors={}, values={}), resumable)
    if index:
        cache[folder] = cached
    return cached


def _manifest_of(catalog: Catalog, folder: str, *, entries: bool = True) -> Manifest:
    """Open a checkpoint. The last one of a run may be a Hugging Face folder."""
    return open_any(catalog.store, folder, check_files=True, entries=entries).manifest
