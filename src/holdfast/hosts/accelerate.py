"""Holdfast in Accelerate: `save_state` seals checkpoints, `load_state` loads the newest good one.

    accelerator = holdfast.hosts.accelerate.prepare(Accelerator(...))

Written for Accelerate 1.15.
"""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.comm import Ranks, all_ranks, run_on_all
from holdfast.errors import ExistsError, NotFoundError, UsageError
from holdfast.format.names import number_of, number_of_folder
from holdfast.format.seal import SEAL
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.choosing import (
    check_sealed,
    newest_good_on_all_hosts,
    none_good,
    run_on_hosts,
)
from holdfast.hosts.sealing import delete, sealed_by_all
from holdfast.storage.opening import local_path

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
        self._resumed_from: Path | None = None
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
            output_dir = str(self._named_folder() / f"checkpoint_{accelerator.save_iteration}")
        if output_dir is None:
            raise UsageError(
                "`save_state` needs a path",
                hint="pass one, or `ProjectConfiguration(automatic_checkpoint_naming=True)`",
            )
        path = os.path.abspath(output_dir)  # noqa: PTH100 - links stay links
        publishes = self._publishes()
        if is_named and not self._resumed:
            run_on_hosts(self._all(), partial(_check_free, Path(path)), decides=publishes)
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
            self._rotate(Path(path), settings.total_limit)
        return path

    def load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Check a checkpoint, and load it as `Accelerator.load_state` does.

        Collective.

        Raises:
            DamagedError: the checkpoint at the path is damaged, or all checkpoints are.
            NotFoundError: there is no checkpoint.
        """
        path = self._good(input_dir)
        loaded = self._load(path, *args, **kwargs)
        settings = self._accelerator.project_configuration
        is_named = settings.automatic_checkpoint_naming
        if is_named and Path(path).resolve().parent == self._named_folder().resolve():
            # Otherwise the next save would be `checkpoint_0` again, which may exist already.
            settings.iteration = (number_of_folder(Path(path).name) or 0) + 1
            self._resumed = True
            self._resumed_from = Path(path).resolve()
        return loaded

    def end_training(self) -> None:
        """Wait until all checkpoints are durable, then call `Accelerator.end_training`.

        Collective.

        Raises:
            StorageError: the last checkpoint could not be made durable.
        """
        run_on_all(self._all(), self._background.wait)
        self._end()

    def _good(self, input_dir: str | None) -> str:
        """Return the path of the checkpoint that `load_state(input_dir)` loads. Collective."""
        is_named = self._accelerator.project_configuration.automatic_checkpoint_naming
        if input_dir is None and is_named:
            return self._newest(self._named_folder(), _NAMED)
        if input_dir is None and self._folder is None:
            raise UsageError(
                "`load_state` needs a path",
                hint="pass a checkpoint or a folder of checkpoints, or `prepare(..., folder=...)`",
            )
        text = os.path.expanduser(input_dir or self._folder or "")  # noqa: PTH111
        root = Path(local_path(text))
        ranks, decides = self._all(), self._publishes()
        if ranks.all_reduce_max([decides and _holds_sealed(root)])[0]:
            return self._newest(root, _ANY)
        run_on_hosts(ranks, lambda: _check_path(root), decides=decides)
        return str(root)

    def _newest(self, root: Path, pattern: re.Pattern[str]) -> str:
        ranks, decides = self._all(), self._publishes()
        newest = newest_good_on_all_hosts(root, pattern, ranks=ranks, decides=decides)
        if newest is None:
            run_on_hosts(ranks, lambda: _refuse_damaged(root), decides=decides)
            raise NotFoundError(f"`{root}` has no checkpoint", hint="start without `load_state`")
        logger.info("loading `%s`", newest)
        return str(newest)

    def _publishes(self) -> bool:
        """Return whether this rank seals and deletes checkpoints. One rank does so, or one per
        host."""
        if self._accelerator.project_configuration.save_on_each_node:
            return bool(self._accelerator.is_local_main_process)
        return bool(self._accelerator.is_main_process)

    def _named_folder(self) -> Path:
        return Path(self._accelerator.project_dir, "checkpoints")

    def _all(self) -> Ranks:
        if self._ranks is None:
            self._ranks = all_ranks()
        return self._ranks

    def _rotate(self, saved: Path, limit: int | None) -> None:
        """Keep the newest `limit` sealed checkpoints up to `saved`, the one just saved. Delete the
        older ones. Checkpoints with later numbers stay. The one that was loaded stays until this
        run has saved twice. Called only after a save, so that a failed save deletes nothing."""
        if limit is None:
            return
        last = number_of(saved.name) or 0
        numbers = {
            path: number_of(path.name) or 0
            for path in saved.parent.iterdir()
            if _NAMED.fullmatch(path.name) and (path / SEAL).exists()
        }
        older = sorted((path for path in numbers if numbers[path] <= last), key=numbers.__getitem__)
        for path in older[: -max(1, limit)]:
            if path.resolve() != self._resumed_from:
                self._background.delete(str(path), partial(delete, path.absolute()))
        # After the next save, this run has two checkpoints of its own, and needs no other.
        self._resumed_from = None


def _check_free(path: Path) -> None:
    if path.exists():
        raise ExistsError(
            f"`{path}` exists already",
            hint="set `accelerator.save_iteration` to the number after the last checkpoint's",
        )


def _holds_sealed(folder: Path) -> bool:
    """Return whether a folder is not a checkpoint itself, but has sealed folders in it."""
    if not folder.is_dir() or (folder / SEAL).exists():
        return False
    return any((path / SEAL).exists() for path in folder.iterdir() if path.is_dir())


def _check_path(path: Path) -> None:
    """Raise an error if there is no checkpoint at a path, or if it is damaged. Warn if it has no
    seal, by which to check it."""
    if not path.is_dir():
        raise NotFoundError(f"`{path}` does not exist")
    check_sealed(path, hint=f"`load_state({str(path.parent)!r})` takes the newest good one there")


def _refuse_damaged(folder: Path) -> None:
    """Raise a DamagedError if a folder, which has no good checkpoint, is not empty."""
    # Hidden files do not count: a first save that was killed leaves a hidden folder.
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise none_good(folder)
