"""Read runs repeatedly in threads, so that no request waits for a disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from holdfast.catalog.paths import full_path
from holdfast.dashboard.discovery import FoundRuns, find_runs
from holdfast.dashboard.figures import NO_FIGURES, Figures, figures_of
from holdfast.dashboard.history import History, HistoryReader
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.storage.opening import is_url

READ_S = 2.0
"""Minimum seconds between two reads of a folder."""

READ_BUCKET_S = 10.0
"""Minimum seconds between two reads of a folder in a bucket, since requests cost money."""

SEARCH_S = 10.0
"""Minimum seconds between two searches for new runs."""

SEARCH_BUCKET_S = 120.0
"""Minimum seconds between two searches in a bucket."""

READ_SHARE = 0.05
"""Maximum share of a thread's time in which it reads. So slow folders are read less often."""

CPU_SHARE = 0.08
"""Maximum share of one CPU core for reading all runs."""

SEARCH_CPU_SHARE = 0.02
"""Maximum share of one CPU core for searching all folders."""

FIRST_READ_S = 1.0
"""Maximum seconds to wait at the start for the first searches and reads."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Result of reading a folder once."""

    history: History | None
    problem: str | None = None
    """Reason why there is no history."""

    time: float = 0.0
    """Unix time of the read."""

    figures: Figures = NO_FIGURES
    """Facts from `history`; if that is None, from the last history, or else the metrics alone."""

    is_missing: bool = False
    """Whether `history` is None because the folder does not exist or has no checkpoints."""

    was_seen: bool = False
    """Whether this or an earlier read has found checkpoints."""

    pause_s: float = READ_S
    """Seconds until the next read."""


class WatchedFolder:
    """Folder that a thread reads repeatedly until `stop`. A slow folder does not delay others."""

    def __init__(self, folder: str, *, cpu_share: float = CPU_SHARE) -> None:
        """`cpu_share`: largest share of one CPU core for reading this folder."""
        self.folder = folder
        self.path: str = full_path(folder)
        """Absolute path of the folder, or its URL."""
        self.latest: ReadResult = ReadResult(None, "not read yet")
        """Result of the latest read."""
        self.cpu_share = cpu_share
        self._reader = HistoryReader(folder)
        self._stopped, self._first = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="holdfast-look", daemon=True).start()

    def wait_for_first(self, timeout_s: float = FIRST_READ_S) -> None:
        """Wait until the folder has been read once, but at most `timeout_s` seconds."""
        self._first.wait(timeout_s)

    def stop(self) -> None:
        """Stop reading the folder."""
        self._stopped.set()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stopped.wait(pause_s):
            started, cpu_started = time.monotonic(), time.thread_time()
            result = self._read()
            spent, cpu_spent = time.monotonic() - started, time.thread_time() - cpu_started
            least_s = READ_BUCKET_S if is_url(self.path) else READ_S
            pause_s = max(least_s, spent / READ_SHARE, cpu_spent / self.cpu_share)
            self.latest = replace(result, time=time.time(), pause_s=pause_s)
            self._first.set()

    def _read(self) -> ReadResult:
        before = self.latest
        failed = replace(before, history=None, is_missing=False)
        try:
            history = self._reader.read()
            unchanged = history is before.history
            figures = before.figures if unchanged else figures_of(history)
            return ReadResult(history, figures=figures, was_seen=True)
        except NotFoundError as error:
            figures = before.figures if before.was_seen else self._figures_of_metrics()
            return replace(failed, problem=error.what, figures=figures, is_missing=True)
        except HoldfastError as error:
            return replace(failed, problem=error.what)
        except Exception as error:  # noqa: BLE001 - the next read may succeed
            return replace(failed, problem=f"{type(error).__name__}: {error}")

    def _figures_of_metrics(self) -> Figures:
        """Return the `Figures` of a run that has not saved yet, from its metrics alone.

        If the metrics cannot be read, return `NO_FIGURES`.
        """
        try:
            return figures_of(self._reader.read_metrics())
        except HoldfastError:
            return NO_FIGURES


class Fleet:
    """Runs at and below the given folders. Each run has a number that does not change."""

    def __init__(self, folders: Sequence[str]) -> None:
        """`folders`: folders of checkpoints, or folders above such folders.

        The number of a given folder of checkpoints is its position in `folders`. Runs that are made
        later are found too. A folder that is given twice counts once.
        """
        self._num_given = len(folders)
        self._lock = threading.Lock()
        self._runs: dict[int, WatchedFolder] = {}
        self._paths: set[str] = set()
        self._incomplete: set[str] = set()
        self._is_stopped = False
        self._given: dict[str, int] = {}
        for number, folder in enumerate(folders):
            self._given.setdefault(full_path(folder), number)
        cpu_share = SEARCH_CPU_SHARE / max(len(self._given), 1)
        self._searches = {
            number: _Search(self, number, folders[number], cpu_share)
            for number in self._given.values()
        }
        deadline = time.monotonic() + FIRST_READ_S
        for number, search in self._searches.items():
            if not search.first.wait(max(deadline - time.monotonic(), 0)):
                # The folder hangs. Add it as a run, so that it is shown as unreadable.
                self.add(number, folders[number], FoundRuns((), is_complete=True))
        for run in self.runs.values():
            run.wait_for_first(max(deadline - time.monotonic(), 0))

    @property
    def runs(self) -> Mapping[int, WatchedFolder]:
        """Runs by number, sorted by number."""
        with self._lock:
            return dict(sorted(self._runs.items()))

    @property
    def incomplete(self) -> Sequence[str]:
        """Given folders that were searched only in part, since they are too large."""
        with self._lock:
            return sorted(self._incomplete)

    @property
    def is_single(self) -> bool:
        """Whether a single folder was given, and it is the folder of a run."""
        with self._lock:
            return self._num_given == 1 and [*self._runs] == [0] and not self._incomplete

    def stop(self) -> None:
        """Stop searching and reading."""
        with self._lock:
            # Makes `add` ignore the results of searches that are still in progress.
            self._is_stopped = True
        for search in self._searches.values():
            search.stopped.set()
        for run in self.runs.values():
            run.stop()

    def add(self, number: int, folder: str, found: FoundRuns) -> None:
        """Watch the runs that a search has found at or below a given folder.

        `number`: position of the folder among the given ones.
        """
        root = full_path(folder)
        # Leave out folders that were given themselves. Their own searches add them with their own
        # numbers, no matter which search ends first.
        below = [path for path in found.folders if path != root and path not in self._given]
        with self._lock:
            if self._is_stopped:
                return
            if found.is_complete:
                self._incomplete.discard(folder)
            else:
                self._incomplete.add(folder)
            if found.folders and found.folders != [root]:
                # The given folder seemed to be a run that has not saved yet, but contains runs.
                if number in self._runs:
                    self._runs.pop(number).stop()
                    self._paths.discard(root)
            elif number not in self._runs and (found.folders or not self._has_below(root)):
                self._watch(number, folder, root)
            for path in below:
                if path not in self._paths:
                    next_number = max([*self._runs, self._num_given - 1]) + 1
                    self._watch(next_number, folder.rstrip("/") + path[len(root) :], path)

    def _has_below(self, root: str) -> bool:
        return any(path.startswith(f"{root}/") for path in self._paths)

    def _watch(self, number: int, folder: str, path: str) -> None:
        if path in self._paths:
            return
        self._paths.add(path)
        self._runs[number] = WatchedFolder(folder)
        for run in self._runs.values():
            run.cpu_share = CPU_SHARE / len(self._runs)


class _Search:
    """Thread that repeatedly searches one given folder for runs."""

    def __init__(self, fleet: Fleet, number: int, folder: str, cpu_share: float) -> None:
        self._fleet, self._number, self._folder = fleet, number, folder
        self._cpu_share = cpu_share
        self.first, self.stopped = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="holdfast-search", daemon=True).start()

    def _run(self) -> None:
        root, pause_s = full_path(self._folder), 0.0
        while not self.stopped.wait(pause_s):
            started, cpu_started = time.monotonic(), time.thread_time()
            try:
                found = find_runs(self._folder)
            except Exception:  # noqa: BLE001 - the next search may succeed
                found = FoundRuns((), is_complete=True)
            self._fleet.add(self._number, self._folder, found)
            self.first.set()
            if found.folders == [root]:
                return
            spent, cpu_spent = time.monotonic() - started, time.thread_time() - cpu_started
            least_s = SEARCH_BUCKET_S if is_url(root) else SEARCH_S
            pause_s = max(least_s, spent / READ_SHARE, cpu_spent / self._cpu_share)
