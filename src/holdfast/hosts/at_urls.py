"""Checkpoints of Lightning at URLs: single files, and folders of shards. A checkpoint whose name
begins with `last` stands for the newest good one beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO

from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import fetch_file
from holdfast.catalog.newest import LocalCopies
from holdfast.catalog.open_any import is_checkpoint, open_any
from holdfast.catalog.paths import open_parent
from holdfast.catalog.seal import has_seal
from holdfast.catalog.temporary import ROOM, TemporaryFolder
from holdfast.catalog.upload import write_file
from holdfast.comm import Ranks, run_on_all, run_on_rank_0
from holdfast.errors import (
    DamagedError,
    ExistsError,
    HoldfastError,
    NotFoundError,
    StorageError,
    UsageError,
)
from holdfast.format.names import number_of
from holdfast.hosts.files import why_not_good, why_not_written
from holdfast.hosts.folders import copy_again, is_first_of_host
from holdfast.hosts.sealing import delete
from holdfast.storage.opening import is_url, written_store
from holdfast.storage.store import ReadStore, Replacing, Stamping

logger: logging.Logger = logging.getLogger("holdfast")

LAST = "last"
"""Start of the names that Lightning's `save_last` and `ckpt_path="last"` use."""


def handles(path: object) -> bool:
    """Return whether `path` is a URL at which Holdfast can save and replace files."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    if not is_url(text):
        return False
    try:
        return isinstance(written_store(text.rpartition("/")[0]), Replacing)
    except UsageError as error:
        logger.warning("Lightning saves to `%s` without Holdfast: %s", text, error.what)
        return False


@contextmanager
def saved_file(url: str) -> Iterator[IO[bytes]]:
    """Context that yields a local file, open for writing. At the end, the file is uploaded. It
    replaces a file at the URL, which stays whole until then.

    Raises:
        StorageError: the file cannot be written or uploaded.
    """
    store, name = open_parent(url)
    assert isinstance(store, Replacing), "see `handles`"
    if f"{name}/" in store.list():
        raise ExistsError(
            f"`{url}` is a folder, and a file was to take its place",
            hint="delete the folder, or save to another path",
        )
    temporary = TemporaryFolder.make()
    path = temporary.path / "file"
    try:
        try:
            with path.open("xb") as file:
                yield file
        except Exception as error:
            if (why := why_not_written(error)) is None:
                raise
            what = f"cannot write `{path}`, to save `{url}`: {why}"
            raise StorageError(what, hint=ROOM) from error
        with store.replace(name, path.stat().st_size) as writer:
            write_file(writer, path)
    finally:
        temporary.delete()


@dataclass(frozen=True, slots=True)
class Copied:
    """A checkpoint that was copied to a folder of this machine."""

    entry: str
    """Name of the checkpoint, with `/` at the end for a folder."""

    path: Path
    """Path of the copy."""


def good_copy(url: str, into: Path) -> Copied | None:
    """Copy the checkpoint at a URL to the local folder `into`. Return None if there is nothing at
    the URL.

    If the last part of the URL begins with `last`, copy the newest good checkpoint beside it.

    Raises:
        DamagedError: the checkpoint is damaged, or all are.
    """
    store, name = open_parent(url)
    entries = {entry.rstrip("/"): entry for entry in store.list()}
    if name not in entries:
        return None
    names = _newest_first(store, name, entries) if name.startswith(LAST) else [name]
    for other in names:
        where = location(store, other)
        found = _copied(into, store, entries[other])
        if isinstance(found, Copied):
            if other != name:
                logger.warning("loading `%s`, the newest good one beside `%s`", where, url)
            return found
        if not name.startswith(LAST):
            raise DamagedError(
                f"`{url}` is damaged: {found}",
                hint=f"with `save_last`, `{store.url}/last.ckpt` stands for the newest good one",
            )
        logger.warning("passed over `%s`: %s", where, found)
    raise DamagedError(f"no checkpoint in `{store.url}` is good")


def good_copy_on_all_hosts(url: str, into: Path, ranks: Ranks) -> Path:
    """Copy a checkpoint as `good_copy` does, to the folder `into` on each host. Return the path of
    the copy.

    Collective. Rank 0 chooses the checkpoint. An error of one rank is raised on all.

    Raises:
        NotFoundError: there is nothing at the URL.
    """
    store, _ = open_parent(url)

    def choose() -> tuple[str, Path]:
        found = good_copy(url, into)
        if found is None:
            raise NotFoundError(f"`{url}` does not exist")
        return found.entry, found.path.relative_to(into)

    def copy() -> None:
        if entry.endswith("/"):
            copy_again(store, entry[:-1], into, relative)
        elif isinstance(found := _copied(into, store, entry), str):
            raise DamagedError(f"`{location(store, entry)}` is damaged on this host: {found}")

    is_first = is_first_of_host(ranks)
    entry, relative = run_on_rank_0(ranks, choose)
    run_on_all(ranks, lambda: copy() if is_first and ranks.rank else None)
    return into / relative


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


def _newest_first(store: ReadStore, name: str, entries: Mapping[str, str]) -> list[str]:
    """Return `name` and the checkpoints beside it of the same kind, the newest first. `entries`:
    entry of each name in the listing, with `/` at the end of a folder."""
    is_folder, suffix = entries[name].endswith("/"), PurePath(name).suffix
    beside = [
        other
        for other, entry in entries.items()
        if other.endswith(suffix) and not other.startswith(".") and entry.endswith("/") == is_folder
    ]
    is_resumable = _is_checkpoint if is_folder else _has_more_than_weights
    names = [other for other in beside if other == name or is_resumable(store, other)]
    if isinstance(store, Stamping):
        # Stores round times to seconds. Of files of one second, prefer the one with the highest
        # number: a killed save may have written it, and not `last`.
        times = {other: store.changed_at(other) for other in names}
        return sorted(names, key=lambda o: (times[o], number_of(o) or 0), reverse=True)
    return sorted(names, key=lambda o: (o == name, number_of(o) or 0), reverse=True)


def _is_checkpoint(store: ReadStore, name: str) -> bool:
    return has_seal(store, name) or is_checkpoint(store, name)


def _has_more_than_weights(store: ReadStore, name: str) -> bool:
    return not holds_weights_alone(store, name)


def _copied(into: Path, store: ReadStore, entry: str) -> Copied | str:
    """Copy a checkpoint. Return the copy if it is good, else the reason why it is not: then nothing
    is left of it. `entry`: name, with `/` at the end for a folder."""
    name = entry.rstrip("/")
    try:
        if entry.endswith("/"):
            copies = LocalCopies(into)
            why = copies.why_not(store, name) if _is_checkpoint(store, name) else "no checkpoint"
            return why if why is not None else Copied(entry, copies.paths[name])
        fetch_file(store, name, into)
        why = why_not_good(into / name)
    except (NotFoundError, DamagedError) as error:
        why = error.what
    if why is None:
        return Copied(entry, into / name)
    (into / name).unlink(missing_ok=True)
    return why
