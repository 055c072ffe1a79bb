"""Which step a resume takes. Runs on one rank; what it finds goes to all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, replace

from holdfast.catalog.catalog import Catalog, check_whole, open_manifest
from holdfast.catalog.findings import kind_of
from holdfast.catalog.marks import damaged_steps, mark_damaged, pinned_steps
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest
from holdfast.format.names import MANIFEST
from holdfast.hf.folder import open_folder
from holdfast.manager.policy import Candidate

logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is there, and what it holds."""

    step: int
    folder: str
    manifest: Manifest


def strict_step(catalog: Catalog, step: int) -> Step:
    """This step, or an error that says why not; a mark of damage is no reason not to try."""
    return Step(step, catalog.folders().get(step, ""), catalog.open_step(step))


def newest_resumable(catalog: Catalog, below: int | None) -> tuple[Step | None, list[str]]:
    """The newest step (below one, where given) that looks whole and can be resumed from, and a line
    on each newer one that is neither. Its data is checked as it is read, not here; where that has
    failed before, the mark that it left is enough."""
    refused = []
    damaged = damaged_steps(catalog.store)
    for step, folder in reversed(catalog.folders().items()):
        if below is not None and step >= below:
            continue
        if step in damaged:
            refused.append(f"step {step}: {damaged[step]}")
            continue
        try:
            manifest = _opened(catalog, folder)
        except HoldfastError as error:
            refused.append(f"step {step}: {error.what}")
            continue
        if can_resume(step, manifest):
            return Step(step, folder, manifest), refused
        refused.append(f"step {step}: it holds the model alone, and cannot be resumed from")
    return None, refused


def remember_damage(catalog: Catalog, step: int, error: HoldfastError) -> None:
    """Let later runs know at once what a load of this step ended in."""
    if isinstance(error, NotFoundError):
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
class Looked:
    """What is remembered of a step that was whole."""

    index: int
    """Checksum of the bytes of its index."""

    manifest: Manifest
    """Without its entries: they may be a million, and are what was written if its bytes are."""

    resumable: bool


def good_steps(
    catalog: Catalog, folders: Mapping[int, str], looked: MutableMapping[str, Looked] | None = None
) -> Iterator[Candidate]:
    """Those of these steps (with their folders) of which every file is there in full and whose data
    nobody has found damaged, newest first, with what retention asks of them.

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
        yield Candidate(step, found.resumable, found.manifest.metrics, step in pinned)


def _look(catalog: Catalog, step: int, folder: str, looked: MutableMapping[str, Looked]) -> Looked:
    index = 0
    with suppress(NotFoundError):
        key = f"{folder}/{MANIFEST}"
        index = checksum(catalog.store.read(key, 0, catalog.store.size(key)))
    before = looked.get(folder)
    if before is not None and before.index == index:
        check_whole(catalog.store, folder, before.manifest)
        return before
    manifest = _opened(catalog, folder, entries=False)
    found = Looked(index, replace(manifest, tensors={}, values={}), can_resume(step, manifest))
    if index:
        looked[folder] = found
    return found


def _opened(catalog: Catalog, folder: str, *, entries: bool = True) -> Manifest:
    """What a step holds; the last one of a run may be a Hugging Face folder."""
    try:
        return open_manifest(catalog.store, folder, entries=entries)
    except NotFoundError as error:
        with suppress(NotFoundError):
            return open_folder(catalog.store, folder).manifest
        raise error from None


def can_resume(step: int, manifest: Manifest) -> bool:
    """Whether a run can go on from a step: from all of its state, or from a seed."""
    return kind_of(manifest) == "full" or step == 0
