"""Seal checkpoints that other frameworks write on all ranks, and publish them on one rank."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import files_below
from holdfast.catalog.paths import open_for_saving
from holdfast.catalog.replaceable import not_sealed, why_not_removable, why_not_replaceable
from holdfast.catalog.seal import Unsealed, begin, is_sealed, sync_files, sync_path
from holdfast.comm import Ranks, run_on_all, run_on_rank_0
from holdfast.errors import HoldfastError, StorageError, UsageError
from holdfast.format.names import HiddenFolder
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.raising import errors_on_all
from holdfast.hosts.uploading import uploaded_by_all
from holdfast.storage.opening import folder_store, is_url, without_scheme
from holdfast.storage.store import Copying, Store

logger: logging.Logger = logging.getLogger("holdfast")


@contextmanager
def sealed_by_all(
    path: str,
    *,
    ranks: Ranks,
    publishes: bool,
    background: BackgroundSync | None = None,
    shared: bool = True,
    moves_aside: bool = False,
    replaces_file: Callable[[Path], AbstractContextManager[Any]] | None = None,
    link: str | None = None,
) -> Iterator[Path]:
    """Publish the files that all ranks write in the `with` block as the folder `path`, all or none.

    The context gives the hidden folder to write to. `publishes`: whether this rank makes, seals and
    renames that folder. If all hosts have the folder in common (`shared`), one rank does; otherwise
    one rank of each host does, and each host may have another `path`. `background`: makes the
    checkpoint durable later, if there is a durable one beside it.

    `path` may be a URL: see `uploaded_by_all`. Then the checkpoint is durable at the end.

    A checkpoint at `path` is replaced. Any other folder there is an error, and so is a sealed
    checkpoint to which files were added. With `moves_aside`, such a folder is renamed instead, with
    a warning, and such files are copied to the new checkpoint. `replaces_file`: context in which a
    file at `path` has another name, so that the folder can get the name `path`. `link`: name of a
    link in the hidden folder that leads to the folder itself, for frameworks that append this name
    to the path that they get.

    Collective. An error of one rank is raised on all, and nothing is published.
    """
    first_path, chosen_id = ranks.broadcast((path, os.urandom(4).hex()))
    path = without_scheme(first_path if shared else path)
    if is_url(path):
        check_shared(path, shared)
        if moves_aside:
            run_on_rank_0(ranks, partial(_make_way, path))
        with uploaded_by_all(path, ranks=ranks, link=link) as of_host:
            yield of_host
        return
    catalog, name = open_for_saving(path)
    folder = Path(catalog.store.url, str(HiddenFolder("attempt", name, chosen_id)))
    final = Path(catalog.store.url, name)

    def begin_here() -> Unsealed | None:
        if not publishes:
            return None
        if background is not None:
            background.wait()
        added = _make_way(path) if moves_aside else {}
        is_file = replaces_file is not None and final.is_file()
        unsealed = begin(
            path,
            overwrite=not is_file,
            chosen_id=chosen_id,
            checks_name=not added and not is_file,
            durable=background is None or is_file or not background.may_follow(catalog.store.url),
        )
        for file, source in added.items():
            (unsealed.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, unsealed.folder / file)
        if link is not None:
            (unsealed.folder / link).symlink_to(".")
        return unsealed

    def publish() -> None:
        if unsealed is not None:
            if link is not None:
                (unsealed.folder / link).unlink()
            unsealed.seal()
            with (replaces_file or nullcontext)(final):
                unsealed.publish()
            if background is not None:
                _sync_later(background, unsealed, final)

    unsealed = run_on_all(ranks, begin_here)
    try:
        run_on_all(ranks, partial(_check_visible, folder))
        with errors_on_all(ranks):
            yield folder
        run_on_all(ranks, publish)
    except BaseException:
        if unsealed is not None:
            unsealed.abort()
        raise


def _check_visible(folder: Path) -> None:
    if not folder.is_dir():
        raise StorageError(
            f"this rank does not see `{folder}`, which another rank has made",
            hint="save to a folder that all hosts share",
        )


def check_shared(url: str, shared: bool) -> None:
    """Raise a UsageError if each host is to save a whole checkpoint of its own to one URL."""
    if not shared:
        raise UsageError(
            f"with `save_on_each_node`, each host would save a checkpoint of its own to `{url}`",
            hint="leave `save_on_each_node` out: then all hosts save one checkpoint together",
        )


def _sync_later(background: BackgroundSync, unsealed: Unsealed, path: Path) -> None:
    if unsealed.is_durable:
        background.note_durable(unsealed.catalog.store.url)
        return

    def sync() -> None:
        sync_files(path)
        sync_path(path.parent)

    background.sync(str(path), sync)


def _make_way(path: str) -> dict[str, Path]:
    """Move the folder `path` aside if it may not be replaced, such as one that was left incomplete.

    A sealed folder of this machine to which files were added stays, since it may be the only one to
    resume from until the new one is published. Return name -> path of the added files; {} if there
    are none.
    """
    catalog, name = open_for_saving(path)
    store = catalog.store
    store.make_folder("")
    if f"{name}/" not in store.list():
        return {}
    why = why_not_replaceable(store, name)
    if why is None:
        return {}
    if not is_url(store.url) and is_sealed(store, name):
        added = [file for file in not_sealed(store, name) if not file.endswith("/")]
        if added:
            return {file: Path(store.url, name, file) for file in added}
    aside = f"unsealed-{name}-{os.urandom(4).hex()}"
    if is_url(store.url):
        _copy_aside(store, name, aside)
    else:
        folder_store(store.url).rename(name, aside)
    logger.warning(
        "`%s` was there, and is no sealed checkpoint (%s): it is `%s` now",
        catalog.where(name),
        why,
        aside,
    )
    return {}


def _copy_aside(store: Store, name: str, aside: str) -> None:
    """Copy a folder of an object store, then delete it."""
    if not isinstance(store, Copying):
        raise StorageError(
            f"`{location(store, name)}` is in the way, and the store cannot move it",
            hint="move it away with a tool of that store",
        )
    files = list(files_below(store, name))
    for file in files:
        store.copy(f"{name}/{file}", f"{aside}/{file}")
    for file in files:
        store.remove(f"{name}/{file}")


@contextmanager
def warning_if_old_stay(saved: str) -> Iterator[None]:
    """Context in which old checkpoints beside the one just saved are deleted. An error becomes a
    warning: `saved` is saved, and the next save tries again."""
    try:
        yield
    except HoldfastError as error:
        logger.warning("old checkpoints beside `%s` stay: %s", saved, error.what)


def delete(path: str | os.PathLike[str]) -> None:
    """Delete a checkpoint: give it a hidden name, then delete its files. Warn if this fails.

    Files that were added after the seal are deleted too, as the framework itself does.
    """
    try:
        catalog, name = open_for_saving(path)
        catalog.why_kept = why_not_removable
        catalog.store.remove(catalog.set_aside_for_deletion(name))
    except HoldfastError as error:
        logger.warning("`%s` stays: %s", path, error.what)
