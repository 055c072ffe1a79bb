"""Make published checkpoints durable while the training goes on, then delete older ones."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from holdfast.errors import StorageError
from holdfast.failures import worded
from holdfast.saving.background import before_pools_close

logger: logging.Logger = logging.getLogger("holdfast")


_WAITING_MAX = 8
"""Largest number of paths whose syncs and deletions may be pending when another save begins."""


class BackgroundSync:
    """One thread that syncs the checkpoints that a framework has saved, and deletes those that it
    no longer keeps.

    A checkpoint that was not synced survives the death of the process, but a power cut may damage
    it. Therefore each deletion waits for the syncs before it, and is skipped if one of them failed.
    The next save and the end of the process wait for the thread.
    """

    def __init__(self) -> None:
        self._durable: set[str] = set()
        """Folders in which this process has saved a checkpoint that is durable."""

        self._jobs: list[tuple[str, Future[None]]] = []
        """Path and future of each sync and each deletion that may not have finished yet."""

        self._errors: list[StorageError] = []
        """Errors of the syncs that failed since the last `wait`."""

        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def may_follow(self, folder: str) -> bool:
        """Return whether a checkpoint in `folder` may be published before it is synced. It may if
        the folder has a durable checkpoint, from which a run could resume."""
        return os.path.realpath(folder) in self._durable

    def note_durable(self, folder: str) -> None:
        """Note that a checkpoint in `folder` is durable."""
        self._durable.add(os.path.realpath(folder))

    def sync(self, path: str, work: Callable[[], object]) -> None:
        """Run `work`, which makes the checkpoint at `path` durable, in the thread."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised by `wait`
                self._durable.clear()
                failed = StorageError(
                    f"`{path}` was saved, but could not be made durable: {worded(error).what}",
                    hint="a power cut may damage it; the checkpoints before it were kept",
                )
                self._errors.append(failed)

        self._submit(path, run)

    def delete(self, path: str, work: Callable[[], object]) -> None:
        """Run `work`, which deletes the checkpoint at `path` and must not raise, in the thread."""

        def run() -> None:
            if not self._errors:
                work()

        self._submit(path, run)

    def wait(self) -> None:
        """Wait for all syncs and deletions.

        Raises:
            StorageError: a checkpoint that was saved since the last call is not durable.
        """
        if os.getpid() != self._process:
            return  # A forked child has no such thread.
        for _, job in self._jobs:
            job.result()
        self._jobs.clear()
        if self._errors:
            first = self._errors[0]
            self._errors.clear()
            raise first

    def make_way(self, path: str) -> None:
        """Call `wait` if a sync has failed, or if work is pending on `path` or on more than
        `_WAITING_MAX` paths.

        For frameworks that save several files at a time: a file need not wait for the syncs of the
        files before it.
        """
        self._jobs[:] = [(at, job) for at, job in self._jobs if not job.done() or job.exception()]
        waiting = {other for other, _ in self._jobs}
        if len(waiting) > _WAITING_MAX or path in waiting or self._errors:
            self.wait()

    def _submit(self, path: str, run: Callable[[], None]) -> None:
        if self._pool is None or os.getpid() != self._process:
            # Made on use, since frameworks pickle their plugins, and a pool cannot be pickled. A
            # forked child needs a thread of its own.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="holdfast-sync")
            self._process, self._jobs, self._errors = os.getpid(), [], []
            # The finalizer does not refer to this object or its pool, so both can be collected,
            # which ends the thread.
            wait = weakref.finalize(self, _log_unraised, self._process, self._jobs, self._errors)
            before_pools_close(wait)  # A job may use other pools.
        self._jobs.append((path, self._pool.submit(run)))


def _log_unraised(
    process: int, jobs: Sequence[tuple[str, Future[None]]], errors: Sequence[StorageError]
) -> None:
    """Wait for all jobs, then log the first error, since no caller can get it any more."""
    if os.getpid() != process:
        return  # A forked child has no such thread.
    for _, job in jobs:
        job.result()
    for error in errors[:1]:
        logger.error("%s", error)
