"""Make published checkpoints durable while the training goes on, then delete older ones."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from holdfast.errors import StorageError
from holdfast.failures import worded

logger: logging.Logger = logging.getLogger("holdfast")


_WAITING_MAX = 8
"""Most syncs and deletions that wait while another save begins."""


class BackgroundSync:
    """One thread that syncs what a host has saved, and then deletes what the host keeps no longer.

    A checkpoint that was not synced survives the death of the process, but a power cut may damage
    it. Therefore each deletion waits for the syncs before it, and is left out if one failed. The
    next save and the end of the process wait for the thread.
    """

    def __init__(self) -> None:
        self._durable: set[str] = set()
        """Folders in which a checkpoint of this process is durable."""

        self._jobs: list[tuple[str, Future[None]]] = []
        """Path and future of each sync and each deletion that may still wait."""

        self._errors: list[StorageError] = []
        """Errors of the syncs that failed since the last `wait`."""

        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def may_follow(self, folder: str) -> bool:
        """Whether the sync of a checkpoint in `folder` may follow its publication: a durable one is
        there to resume from."""
        return os.path.realpath(folder) in self._durable

    def note_durable(self, folder: str) -> None:
        """Note that a checkpoint in `folder` is durable."""
        self._durable.add(os.path.realpath(folder))

    def sync(self, path: str, work: Callable[[], object]) -> None:
        """Run `work` in the thread, which makes the checkpoint at `path` durable."""

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
        """Run `work` in the thread, which deletes the checkpoint at `path` and must not raise."""

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
        """Wait as `wait` does, if something waits for `path` or much waits. Otherwise only raise.

        For hosts that save several files at once, the last of which need not wait for the first.
        """
        self._jobs[:] = [(at, job) for at, job in self._jobs if not job.done() or job.exception()]
        waiting = {other for other, _ in self._jobs}
        if len(waiting) > _WAITING_MAX or path in waiting or self._errors:
            self.wait()

    def _submit(self, path: str, run: Callable[[], None]) -> None:
        if self._pool is None or os.getpid() != self._process:
            # Made on use: hosts pickle their plugins, and a forked child needs a thread of its own.
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="holdfast-sync")
            self._process, self._jobs, self._errors = os.getpid(), [], []
            # Holds neither this object nor its pool, whose thread ends once they are collected.
            weakref.finalize(self, _log_unraised, self._process, self._jobs, self._errors)
        self._jobs.append((path, self._pool.submit(run)))


def _log_unraised(
    process: int, jobs: Sequence[tuple[str, Future[None]]], errors: Sequence[StorageError]
) -> None:
    """Wait for all jobs, then log the error that nobody can catch any more."""
    if os.getpid() != process:
        return  # A forked child has no such thread.
    for _, job in jobs:
        job.result()
    for error in errors[:1]:
        logger.error("%s", error)
