"""Holdfast in Accelerate: `save_state` seals checkpoints, `load_state` loads the newest good one.

    accelerator = holdfast.hosts.accelerate.prepare(Accelerator(...))

Written for Accelerate 1.15.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.catalog.catalog import location
from holdfast.catalog.paths import full_path, open_parent
from holdfast.catalog.seal import has_seal, matching
from holdfast.comm import Ranks, all_ranks, run_on_all
from holdfast.errors import ExistsError, NotFoundError, UsageError
from holdfast.format.names import number_of, number_of_folder
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.choosing import (
    check_sealed,
    newest_good_on_all_hosts,
    none_good,
    run_on_hosts,
)
from holdfast.hosts.folders import (
    fetch_newest_on_all_hosts,
    fetch_on_all_hosts,
    host_folder,
    identity,
)
from holdfast.hosts.sealing import delete, sealed_by_all, warning_if_old_stay
from holdfast.storage.opening import is_url, open_store

logger: logging.Logger = logging.getLogger("holdfast")

_NAMED = re.compile(r"checkpoint_[0-9]+")
"""Names of folders that Accelerate chooses itself."""

_ANY = re.compile(".*")


def prepare(accelerator: Any, *, folder: str | os.PathLike[str] | None = None) -> Any:
    """Make `save_state` and `load_state` of an `Accelerator` publish and check checkpoints.

    `save_state` writes Accelerate's usual files into a hidden folder, and publishes all of them at
    once, with `holdfast.seal`. `load_state` checks the checkpoint before it loads anything. Without
    a path, it takes the newest good checkpoint: of those with Accelerate's automatic names, or of
    those in `folder`. If the path is a folder of checkpoints, it takes the newest good one there.

    Each of these paths may be the URL of an object store, and so may the `project_dir` of the
    Accelerator.

    Returns the same `Accelerator`.

    Raises:
        UsageError: `accelerator` is not an `Accelerator`.
    """
    if not hasattr(accelerator, "save_state") or not hasattr(accelerator, "project_configuration"):
        raise UsageError(
            f"`accelerator` must be an accelerate.Accelerator, found: {type(accelerator).__name__}"
        )
    host = _Host(accelerator, None if folder is None else os.fspath(folder))
    accelerator.save_state = host.save_state
    accelerator.load_state = host.load_state
    accelerator.end_training = host.end_training
    return accelerator


class _Host:
    """Methods that replace those of an `Accelerator`."""

    def __init__(self, accelerator: Any, folder: str | None) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._save = accelerator.save_state
        self._load = accelerator.load_state
        self._end = accelerator.end_training
        self._ranks: Ranks | None = None
        self._resumed_from: str | None = None
        """Checkpoint that was loaded last, as `identity` gives it."""

        self._background = BackgroundSync()
        self._resumed = False
        """Whether a checkpoint with an automatic name was loaded, so that saves may replace
        later checkpoints."""

    def save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Save as `Accelerator.save_state` does. If that fails, what was at the path before stays.

        Collective.
        """
        accelerator, settings = self._accelerator, self._accelerator.project_configuration
        is_named = settings.automatic_checkpoint_naming
        if is_named:
            output_dir = f"{self._named_folder()}/checkpoint_{accelerator.save_iteration}"
        if output_dir is None:
            raise UsageError(
                "`save_state` needs a path",
                hint="pass one, or `ProjectConfiguration(automatic_checkpoint_naming=True)`",
            )
        path = full_path(os.path.expanduser(output_dir))  # noqa: PTH111 - text, which may be a URL
        publishes = self._publishes()
        if is_named and not self._resumed:
            run_on_hosts(self._all(), partial(_check_free, path), decides=publishes)
        with sealed_by_all(
            path,
            ranks=self._all(),
            publishes=publishes,
            background=self._background,
            shared=not settings.save_on_each_node,
            moves_aside=is_named,
        ) as folder:
            # Else Accelerate would choose a folder itself, and delete old ones before it saves.
            settings.automatic_checkpoint_naming = False
            try:
                self._save(str(folder), *args, **kwargs)
            finally:
                settings.automatic_checkpoint_naming = is_named
        if is_named and publishes:
            self._rotate(path, settings.total_limit)
        return path

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check a checkpoint, and load it as `Accelerator.load_state` does.

        Collective.

        Raises:
            DamagedError: the checkpoint at the path is damaged, or all checkpoints are.
            NotFoundError: there is no checkpoint.
        """
        with ExitStack() as stack:
            path, local = self._find(input_dir, stack)
            loaded = self._load(local, *args, **kwargs)
        settings = self._accelerator.project_configuration
        is_named = settings.automatic_checkpoint_naming
        above, _, name = identity(path).rpartition("/")
        if is_named and above == identity(self._named_folder()):
            # Otherwise the next save would be `checkpoint_0` again, which may exist already.
            settings.iteration = (number_of_folder(name) or 0) + 1
            self._resumed = True
            self._resumed_from = identity(path)
        return loaded

    def end_training(self) -> None:
        """Wait until all checkpoints are durable, then call `Accelerator.end_training`.

        Collective.

        Raises:
            StorageError: the last checkpoint could not be made durable.
        """
        run_on_all(self._all(), self._background.wait)
        self._end()

    def _find(self, input_dir: str | None, stack: ExitStack) -> tuple[str, str]:
        """Return the path or URL of the checkpoint that `load_state(input_dir)` loads, and its path
        on this machine. A copy of a checkpoint at a URL is deleted when `stack` is closed.
        Collective."""
        is_named = self._accelerator.project_configuration.automatic_checkpoint_naming
        if input_dir is None and is_named:
            return self._newest(self._named_folder(), _NAMED, stack)
        if input_dir is None and self._folder is None:
            raise UsageError(
                "`load_state` needs a path",
                hint="pass a checkpoint or a folder of checkpoints, or `prepare(..., folder=...)`",
            )
        path = full_path(os.path.expanduser(input_dir or self._folder or ""))  # noqa: PTH111
        ranks, decides = self._all(), self._publishes()
        found = run_on_all(ranks, lambda: decides and _holds_sealed(path))
        if ranks.all_reduce_max([found])[0]:
            return self._newest(path, _ANY, stack)
        if is_url(path):
            into = stack.enter_context(host_folder(ranks))
            return path, str(fetch_on_all_hosts(path, into, ranks))
        run_on_hosts(ranks, lambda: _check_path(Path(path)), decides=decides)
        return path, path

    def _newest(self, root: str, pattern: re.Pattern[str], stack: ExitStack) -> tuple[str, str]:
        ranks, decides = self._all(), self._publishes()
        if is_url(root):
            into = stack.enter_context(host_folder(ranks))
            newest = fetch_newest_on_all_hosts(root, pattern, into=into, ranks=ranks)
        else:
            newest = newest_good_on_all_hosts(Path(root), pattern, ranks=ranks, decides=decides)
        if newest is None:
            run_on_hosts(ranks, lambda: _refuse_damaged(root), decides=decides)
            raise NotFoundError(f"`{root}` has no checkpoint", hint="start without `load_state`")
        path = f"{root}/{newest.name}" if is_url(root) else str(newest)
        logger.info("loading `%s`", path)
        return path, str(newest)

    def _publishes(self) -> bool:
        """Return whether this rank seals and deletes checkpoints. One rank does so, or one per
        host."""
        if self._accelerator.project_configuration.save_on_each_node:
            return bool(self._accelerator.is_local_main_process)
        return bool(self._accelerator.is_main_process)

    def _named_folder(self) -> str:
        return full_path(f"{os.fspath(self._accelerator.project_dir)}/checkpoints")

    def _all(self) -> Ranks:
        if self._ranks is None:
            self._ranks = all_ranks()
        return self._ranks

    def _rotate(self, saved: str, limit: int | None) -> None:
        """Keep the newest `limit` sealed checkpoints up to `saved`, the one just saved. Delete the
        older ones. Checkpoints with later numbers stay. The one that was loaded stays until this
        run has saved twice. Called only after a save, so that a failed save deletes nothing."""
        if limit is None:
            return
        with warning_if_old_stay(saved):
            self._delete_old(saved, limit)

    def _delete_old(self, saved: str, limit: int) -> None:
        store, name = open_parent(saved)
        names = [n for n in matching(store, _NAMED) if _NAMED.fullmatch(n) and has_seal(store, n)]
        older = [other for other in names if (number_of(other) or 0) <= (number_of(name) or 0)]
        for other in older[max(1, limit) :]:
            path = location(store, other)
            if identity(path) != self._resumed_from:
                self._background.delete(path, partial(delete, path))
        # After the next save, this run has two checkpoints of its own, and needs no other.
        self._resumed_from = None


def _check_free(path: str) -> None:
    store, name = open_parent(path)
    try:
        exists = {name, f"{name}/"} & {*store.list()}
    except NotFoundError:
        return
    if exists:
        raise ExistsError(
            f"`{path}` exists already",
            hint="set `accelerator.save_iteration` to the number after the last checkpoint's",
        )


def _holds_sealed(path: str) -> bool:
    """Return whether a folder is not a checkpoint itself, but has sealed folders in it."""
    if not is_url(path) and not os.path.isdir(path):  # noqa: PTH112 - text, which may be a URL
        return False
    with suppress(UsageError):  # A whole bucket is no checkpoint.
        if has_seal(*open_parent(path)):
            return False
    try:
        store = open_store(path)
        return any(has_seal(store, entry[:-1]) for entry in store.list() if entry.endswith("/"))
    except NotFoundError:
        return False


def _check_path(path: Path) -> None:
    """Raise an error if there is no checkpoint at a path, or if it is damaged. Warn if it has no
    seal, by which to check it."""
    if not path.is_dir():
        raise NotFoundError(f"`{path}` does not exist")
    check_sealed(path, hint=f"`load_state({str(path.parent)!r})` takes the newest good one there")


def _refuse_damaged(root: str) -> None:
    """Raise a DamagedError if a folder, which has no good checkpoint, is not empty."""
    # Hidden files do not count: a first save that was killed leaves a hidden folder.
    with suppress(NotFoundError):
        if any(not name.startswith(".") for name in open_store(root).list()):
            raise none_good(root)
