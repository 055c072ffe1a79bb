"""Seal what all ranks of a host write: begin on one rank, write on all, publish on one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.catalog.paths import open_for_saving
from holdfast.catalog.replaceable import why_not_replaceable
from holdfast.catalog.seal import Unsealed, begin
from holdfast.comm import Ranks, gather_and_run, run_on_all
from holdfast.errors import HoldfastError, RankError
from holdfast.format.names import HiddenFolder

logger: logging.Logger = logging.getLogger("holdfast")


@contextmanager
def sealed_by_all(
    path: str, *, ranks: Ranks, publishes: bool, moves_aside: bool = False
) -> Iterator[Path]:
    """Publish what all ranks write in the `with` block, all or none, as the folder `path`.

    The context gives the same folder on every rank. `publishes`: whether this rank makes, seals and
    renames it: one rank, or one per host where hosts do not share the folder.

    A checkpoint at `path` is replaced. Any other folder there is an error, or is renamed, with a
    warning, if `moves_aside`.

    Collective. An error of one rank is raised on all, and nothing is published.
    """
    chosen_id = ranks.broadcast(os.urandom(4).hex())

    def begin_here() -> Unsealed | None:
        if not publishes:
            return None
        if moves_aside:
            _move_aside(path)
        return begin(path, overwrite=True, chosen_id=chosen_id)

    unsealed = run_on_all(ranks, begin_here)
    catalog, name = open_for_saving(path)
    folder = Path(catalog.store.url, str(HiddenFolder("attempt", name, chosen_id)))
    try:
        error: BaseException | None = None
        try:
            yield folder
        except BaseException as raised:  # noqa: BLE001 - raised once the other ranks know
            error = raised
        _raise_on_all(ranks, error)
        run_on_all(ranks, lambda: None if unsealed is None else unsealed.publish())
    except BaseException:
        if unsealed is not None:
            unsealed.abort()
        raise


def _raise_on_all(ranks: Ranks, error: BaseException | None) -> None:
    """Raise the host's own error where it happened, and a RankError elsewhere."""
    described = None
    if error is not None:
        described = RankError(
            f"the save failed with {type(error).__name__}: {error}",
            hint="nothing was published; the checkpoints before are as they were",
        )
    try:
        if ranks.all_reduce_max([described is not None])[0]:
            gather_and_run(ranks, described, lambda _: None)
    except HoldfastError:
        if error is None:
            raise
    if error is not None:
        raise error


def _move_aside(path: str) -> None:
    """Rename a folder that may not be replaced, such as one that a host has left half written."""
    catalog, name = open_for_saving(path)
    store = catalog.store
    store.make_folder("")
    if f"{name}/" not in store.list():
        return
    why = why_not_replaceable(store, name)
    if why is None:
        return
    aside = f"unsealed-{name}-{os.urandom(4).hex()}"
    store.rename(name, aside)
    logger.warning(
        "`%s` was there, and is no sealed checkpoint (%s): it is `%s` now",
        catalog.where(name),
        why,
        aside,
    )


def delete(path: Path) -> None:
    """Delete a checkpoint: its name first, then its files. Warns where that fails."""
    catalog, name = open_for_saving(path)
    try:
        catalog.store.remove(str(catalog.set_aside_for_deletion(name)))
    except HoldfastError as error:
        logger.warning("`%s` stays: %s", path, error.what)
