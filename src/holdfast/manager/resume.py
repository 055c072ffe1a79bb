"""Which step a resume takes. Runs on one rank; what it finds goes to all."""

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
    """A step that is there, and what it holds."""

    step: int
    folder: str
    manifest: Manifest
    seen: object = None
    """Fingerprint of the checkpoint that was opened."""


def strict_step(catalog: Catalog, step: int) -> ResumableStep:
    """This step, or an error that says why not; a mark of damage is no reason not to try.

    Raises:
        MismatchError: the folder of this step holds another one.
    """
    folder = catalog.folders().get(step, "")
    seen = fingerprint(catalog.store, folder) if folder else None
    manifest = catalog.open_step(step)
    if wrong := misnumbered(step, manifest):
        raise MismatchError(
            f"`{catalog.where(folder)}` is not step {step}: {wrong}",
            hint=f"load step {manifest.step} instead, or give the folder the name "
            f"`{step_name(manifest.step or 0)}` back",
        )
    return ResumableStep(step, folder, manifest, seen)


def newest_resumable(catalog: Catalog, below: int | None) -> tuple[ResumableStep | None, list[str]]:
    """The newest step (below one, where given) that looks whole and can be resumed from, and a line
    on each newer one that is neither. Its data is checked as it is read, not here; where that has
    failed before, the mark that it left is enough."""
    refused: list[str] = []
    damaged = damaged_steps(catalog.store)
    for step in reversed(catalog.folders()):
        if below is not None and step >= below:
            continue
        found: ResumableStep | None = None
        held: Manifest | HoldfastError | None = None
        if step not in damaged:
            try:
                found = _opened_step(catalog, step)
                held = found.manifest
            except HoldfastError as error:
                if step not in catalog.folders():
                    continue  # Retention of a run has removed it since it was listed.
                held = error
        why = why_not_resumable(step, held, damaged.get(step))
        if why is None:
            return found, refused
        refused.append(f"step {step}: {why}")
    return None, refused


def _opened_step(catalog: Catalog, step: int) -> ResumableStep:
    """A step that is there, opened again where another process replaces it meanwhile."""
    for left in reversed(range(LOOKS_MAX)):
        folder = catalog.folders().get(step, step_name(step))
        seen = fingerprint(catalog.store, folder)
        try:
            return ResumableStep(step, folder, _opened(catalog, folder), seen)
        except HoldfastError:
            moved = catalog.folders().get(step) != folder
            if not left or not (moved or fingerprint(catalog.store, folder) != seen):
                raise
    raise AssertionError("the last look returns or raises")


def remember_damage(catalog: Catalog, step: int, error: HoldfastError) -> None:
    """Let later runs know at once what a load of this step ended in. A store that failed may work
    the next time, so that leaves no mark."""
    if isinstance(error, NotFoundError | StorageError):
        return
    try:
        mark_damaged(catalog.store, step, error.what)
    except HoldfastError as failed:
        logger.warning("could not mark step %d as damaged: %s", step, failed)


def newest_final(catalog: Catalog) -> int | None:
    """The newest step that looks whole, if it holds the model alone and is no seed."""
    newest = next(good_steps(catalog, catalog.folders()), None)
    return newest.step if newest is not None and not newest.resumable else None


@dataclass(frozen=True, slots=True)
class CachedIndex:
    """What is remembered of a step that was whole."""

    index: int
    """Checksum of the bytes of its index."""

    manifest: Manifest
    """Without its entries: they may be a million, and are what was written if its bytes are."""

    resumable: bool


def good_steps(
    catalog: Catalog,
    folders: Mapping[int, str],
    looked: MutableMapping[str, CachedIndex] | None = None,
) -> Iterator[Candidate]:
    """Those of these steps (with their folders) of which every file is there in full, whose data
    nobody has found damaged and that have their own number, newest first, with what retention asks
    of them.

    `looked` is filled, and spares decoding an index that has not changed: files are looked at.
    """
    looked = {} if looked is None else looked
    for gone in looked.keys() - {*folders.values()}:
        del looked[gone]
    damaged, pinned = damaged_steps(catalog.store), pinned_steps(catalog.store)
    for step in sorted(folders.keys() - damaged.keys(), reverse=True):
        try:
            found = _look(catalog, step, folders[step], looked)
        except HoldfastError:
            continue
        if misnumbered(step, found.manifest):
            continue
        yield Candidate(step, found.resumable, found.manifest.metrics, step in pinned)


def _look(
    catalog: Catalog, step: int, folder: str, looked: MutableMapping[str, CachedIndex]
) -> CachedIndex:
    index = 0
    with suppress(NotFoundError):
        index = checksum(read_index(catalog.store, f"{folder}/{MANIFEST}"))
    before = looked.get(folder)
    if before is not None and before.index == index:
        check_whole(catalog.store, folder, before.manifest)
        return before
    manifest = _opened(catalog, folder, entries=False)
    resumable = why_not_resumable(step, manifest) is None
    found = CachedIndex(index, replace(manifest, tensors={}, values={}), resumable)
    if index:
        looked[folder] = found
    return found


def _opened(catalog: Catalog, folder: str, *, entries: bool = True) -> Manifest:
    """What a step holds; the last one of a run may be a Hugging Face folder."""
    return open_any(catalog.store, folder, check_files=True, entries=entries).manifest
