"""Single files of checkpoints at URLs, and folders whose names say little, such as `last`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import fetch_file
from holdfast.catalog.newest import why_not_fetched
from holdfast.catalog.open_any import open_any
from holdfast.catalog.paths import open_parent
from holdfast.catalog.staging import Staging
from holdfast.catalog.upload import write_file
from holdfast.comm import Ranks, run_on_all, run_on_rank_0
from holdfast.errors import DamagedError, HoldfastError, NotFoundError
from holdfast.format.names import number_of
from holdfast.hosts.files import why_not_good
from holdfast.hosts.folders import is_first_of_host
from holdfast.hosts.sealing import delete
from holdfast.storage.opening import is_url, written_store
from holdfast.storage.store import ReadStore, Replacing, Stamping

logger: logging.Logger = logging.getLogger("holdfast")

LAST = "last"
"""Start of the names that Lightning's `save_last` and `ckpt_path="last"` use."""


def handles(path: object) -> bool:
    """Return whether `path` is a URL at which Holdfast can replace a file."""
    text = str(path)
    return is_url(text) and isinstance(written_store(text.rpartition("/")[0]), Replacing)


@contextmanager
def saved_file(url: str) -> Iterator[IO[bytes]]:
    """Context that yields a file of this machine, open for writing. At the end, the file is put
    into the object store. It replaces a file at the URL, which stays whole until then.

    Raises:
        StorageError: the file cannot be written or put.
    """
    store, name = open_parent(url)
    assert isinstance(store, Replacing), "see `handles`"
    staging = Staging.make()
    path = staging.path / "file"
    try:
        with path.open("xb") as file:
            yield file
        with store.replace(name, path.stat().st_size) as writer:
            for _ in write_file(writer, path):
                pass
    finally:
        staging.delete()


def good_copy(url: str, into: Path) -> tuple[str, Path] | None:
    """Copy the checkpoint at a URL to a folder of this machine. Return the URL of the checkpoint
    that was copied, and the path of the copy; None if there is nothing at the URL.

    If the last part of the URL begins with `last`, copy the newest good checkpoint beside it.

    Raises:
        DamagedError: the checkpoint is damaged, or all are.
    """
    store, name = open_parent(url)
    entries = {entry.rstrip("/"): entry for entry in store.list()}
    if name not in entries:
        return None
    names = [name]
    if name.startswith(LAST):
        suffix, is_folder = Path(name).suffix, entries[name].endswith("/")
        beside = [
            other
            for other, entry in entries.items()
            if other.endswith(suffix) and not other.startswith(".") and _is_like(entry, is_folder)
        ]
        # Stores round times to seconds. Of files of one second, prefer the one with the highest
        # number: a killed save may have written it, and not `last`.
        names = sorted(
            (o for o in beside if o == name or not holds_weights_alone(store, o)),
            key=lambda other: (_changed_at(store, other), number_of(other) or 0),
            reverse=True,
        )
    for other in names:
        where = location(store, other)
        why = _why_not_copied(into, store, other, is_folder=entries[other].endswith("/"))
        if why is None:
            if other != name:
                logger.warning("loading `%s`, the newest good one beside `%s`", where, url)
            return where, into / other
        if not name.startswith(LAST):
            raise DamagedError(
                f"`{url}` is damaged: {why}",
                hint='`ckpt_path="last"` takes the newest good one, with `save_last=True`',
            )
        logger.warning("passed over `%s`: %s", where, why)
    raise DamagedError(f"no checkpoint in `{store.url}` is good")


def good_copy_on_all_hosts(url: str, into: Path, ranks: Ranks) -> Path:
    """Copy a checkpoint as `good_copy` does, to the folder `into` on each host. Return the path of
    the copy.

    Collective. Rank 0 chooses the checkpoint. An error of one rank is raised on all.

    Raises:
        NotFoundError: there is nothing at the URL.
    """

    def choose() -> str:
        found = good_copy(url, into)
        if found is None:
            raise NotFoundError(f"`{url}` does not exist")
        return found[0].rpartition("/")[2]

    is_first = is_first_of_host(ranks)
    name = run_on_rank_0(ranks, choose)
    store, _ = open_parent(url)

    def copy() -> None:
        if is_first and ranks.rank:
            is_folder = f"{name}/" in store.list()
            why = _why_not_copied(into, store, name, is_folder=is_folder)
            if why is not None:
                raise DamagedError(f"`{location(store, name)}` is good on one host only: {why}")

    run_on_all(ranks, copy)
    return into / name


def delete_at(url: str) -> None:
    """Delete the file or the sealed folder at a URL. Warn if this fails."""
    store, name = open_parent(url)
    try:
        names = store.list()
        if f"{name}/" in names:
            delete(url)
        elif name in names and isinstance(store, Replacing):
            store.remove(name)
    except HoldfastError as error:
        logger.warning("`%s` stays: %s", url, error.what)


def holds_weights_alone(store: ReadStore, name: str) -> bool:
    """Return whether a `ModelCheckpoint` of Lightning with `save_weights_only` has written this
    file, so that no run can resume from it. False for a folder, and for a damaged file."""
    try:
        if name not in store.list():
            return False
        manifest = open_any(store, name).manifest
    except HoldfastError:
        return False
    paths = [entry.path for entry in manifest.tensors.values()]
    paths += [entry.path for entry in manifest.values.values()]
    keys = {path[0] for path in paths}
    return "pytorch-lightning_version" in keys and "optimizer_states" not in keys


def _is_like(entry: str, is_folder: bool) -> bool:
    return entry.endswith("/") == is_folder


def _why_not_copied(into: Path, store: ReadStore, name: str, *, is_folder: bool) -> str | None:
    """Copy a checkpoint. Return None, or why it is not good: then nothing is left of the copy."""
    if is_folder:
        return why_not_fetched(into, store, name)
    copy = into / name
    try:
        fetch_file(store, name, copy)
    except NotFoundError as error:
        return error.what
    why = why_not_good(copy)
    if why is not None:
        copy.unlink()
    return why


def _changed_at(store: ReadStore, name: str) -> float:
    return store.changed_at(name) if isinstance(store, Stamping) else 0
