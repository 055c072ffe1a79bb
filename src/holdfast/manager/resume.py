"""Finds the checkpoint to resume from. One rank does this, and sends the result to the others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.findings import misnumbered, why_not_resumable
from holdfast.catalog.marks import damaged_steps, mark_damaged, marks_in
from holdfast.catalog.open_any import Opened, open_in
from holdfast.errors import HoldfastError, MismatchError, NotFoundError, StorageError
from holdfast.format.names import step_name
from holdfast.manager.complete import CompleteCheckpoints, read_any
from holdfast.manager.policy import Candidate

logger: logging.Logger = logging.getLogger("holdfast")


def open_requested(catalog: Catalog, step: int) -> Opened:
    """Open the checkpoint of a step that the user has requested, even if it is marked as damaged.

    Raises:
        NotFoundError: there is no such step. The hint lists the existing ones.
        MismatchError: the folder of this step holds a checkpoint of another step.
    """
    where, folders = catalog.where(step_name(step)), catalog.folders()
    if step not in folders:
        steps = ", ".join(map(str, folders)) or "none"
        raise NotFoundError(f"`{where}` does not exist", hint=f"steps there: {steps}")
    opened = open_in(catalog.store, step_name(step))
    if wrong := misnumbered(step, opened.manifest):
        saved_as = opened.manifest.step or 0
        raise MismatchError(
            f"`{where}` is not step {step}: {wrong}",
            hint=f"load step {saved_as} instead, or rename the folder to `{step_name(saved_as)}`",
        )
    return opened


def newest_resumable(catalog: Catalog, below: int | None) -> tuple[Opened | None, list[str]]:
    """Find the newest checkpoint that a run can resume from, older than step `below` if given.

    Returns this checkpoint, or None, and a line about each newer one that was refused. Data is not
    read here. If a later load finds damaged data, it marks the checkpoint as damaged, and the next
    call of this function refuses it.
    """
    refused: list[str] = []
    damaged = damaged_steps(catalog.store)
    for step in reversed(catalog.folders()):
        if below is not None and step >= below:
            continue
        why = damaged.get(step)
        if why is None:
            try:
                opened = open_in(catalog.store, step_name(step), read_any)
                why = why_not_resumable(step, opened.manifest)
                if why is None:
                    return opened, refused
            except HoldfastError as error:
                if step not in catalog.folders():
                    continue  # Another run's retention deleted it after it was listed.
                why = error.what
        refused.append(f"step {step}: {why}")
    return None, refused


def mark_unless_store_failed(catalog: Catalog, step: int, error: HoldfastError) -> None:
    """Mark the checkpoint of `step` as damaged, since its load raised `error`. Do not mark it if
    the store caused the error: then the next load may succeed."""
    if isinstance(error, NotFoundError | StorageError):
        return
    try:
        mark_damaged(catalog.store, step, error.what)
    except HoldfastError as failed:
        logger.warning("could not mark step %d as damaged: %s", step, failed)


def newest_final(catalog: Catalog) -> int | None:
    """Return the newest good step if its checkpoint holds only the model and is not a seed; else
    None."""
    newest = next(good_steps(catalog, catalog.folders()), None)
    return newest.step if newest is not None and not newest.resumable else None


def good_steps(
    catalog: Catalog, folders: Mapping[int, str], complete: CompleteCheckpoints | None = None
) -> Iterator[Candidate]:
    """Yield the good checkpoints among `folders`, newest first, for the retention rules.

    A good checkpoint has all of its files in full, has no mark `damaged`, and was saved as the step
    in its name. `folders`: names of the folders, by step. `complete`: checkpoints that need not be
    opened; this function adds those that it opens.
    """
    complete = CompleteCheckpoints(catalog.store) if complete is None else complete
    complete.look_again({*folders.values()})
    marks = marks_in(catalog.store)
    damaged = {mark.step for mark in marks if mark.role == "damaged"}
    pinned = {mark.step for mark in marks if mark.role == "pinned"}
    for step in sorted(folders.keys() - damaged, reverse=True):
        try:
            manifest = complete.manifest(folders[step])
        except HoldfastError:
            continue
        if not misnumbered(step, manifest):
            is_resumable = why_not_resumable(step, manifest) is None
            yield Candidate(step, is_resumable, manifest.metrics, step in pinned)
