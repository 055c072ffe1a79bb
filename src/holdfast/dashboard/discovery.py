"""Find the folders of checkpoints at and below a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.catalog.catalog import location, sealed_among
from holdfast.catalog.paths import open_parent
from holdfast.errors import HoldfastError
from holdfast.format.names import LOCK, hidden_folder_of, steps_among
from holdfast.storage.listed_bucket import TooManyError
from holdfast.storage.objects import ObjectStore
from holdfast.storage.store import ReadStore

DEPTH_MAX = 4
"""Maximum number of levels to search below the folder to start from."""

FOLDERS_MAX = 5000
"""Maximum number of folders to search."""

RUNS_MAX = 200
"""Maximum number of runs to find below one folder."""


@dataclass(frozen=True, slots=True)
class FoundRuns:
    """Runs at or below a folder."""

    folders: Sequence[str]
    """Paths or URLs of folders of checkpoints, sorted."""

    is_complete: bool
    """Whether everything was searched: False if a limit ended the search."""


def find_runs(path: str) -> FoundRuns:
    """Find the folders of checkpoints at `path` and below it.

    These are folders that contain checkpoints of a run, sealed folders, unfinished saves, or the
    lock of a run. Skip folders below a folder of checkpoints, hidden folders, links that lead out
    of their folder, and folders that cannot be read.
    """
    store, name = open_parent(path)
    if isinstance(store, ObjectStore):
        # This store requests each listing of the bucket only once.
        store, _ = store.listed()
    found: list[str] = []
    waiting, num_searched, is_complete = deque([(name, 0)]), 0, True
    while waiting and num_searched < FOLDERS_MAX and len(found) < RUNS_MAX:
        folder, depth = waiting.popleft()
        num_searched += 1
        try:
            names = store.list(folder)
            if _holds_checkpoints(store, folder, names):
                found.append(location(store, folder))
            elif depth < DEPTH_MAX:
                waiting += [
                    (f"{folder}/{child}", depth + 1) for child in _below(store, folder, names)
                ]
        except TooManyError:
            is_complete = False
        except HoldfastError:
            continue
    return FoundRuns(sorted(found), is_complete and not waiting)


def _holds_checkpoints(store: ReadStore, folder: str, names: Sequence[str]) -> bool:
    own = LOCK in names or any(hidden_folder_of(name.rstrip("/")) for name in names)
    return own or bool(steps_among(names)) or bool(sealed_among(store, folder, names))


def _below(store: ReadStore, folder: str, names: Sequence[str]) -> list[str]:
    children = [name[:-1] for name in names if name.endswith("/") and not name.startswith(".")]
    return [child for child in children if not store.leads_out(folder, child)]
