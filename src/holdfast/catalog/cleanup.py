"""Cleans up after killed processes: first a plan, which can be shown, then its execution."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import held_of, hidden_folder_of, mark_of, step_name
from holdfast.storage.store import Store

_WHY = {
    "attempt": "an unfinished save",
    "replaced": "a newer save has replaced it",
    "removing": "an unfinished deletion",
}
"""Reasons to delete a folder, by its role."""


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a cleanup."""

    verb: Literal["delete", "restore"]
    folder: str
    """Name of the folder or file."""

    why: str
    """Reason, for messages."""

    target: str = ""
    """Name that `restore` gives back to the folder."""


def plan_cleanup(names: Collection[str], *, only: str | None = None) -> list[Action]:
    """Plan the cleanup of a folder that has these names in it (names of folders end in `/`).

    `only` restricts the plan to the checkpoint of that name. Names do not tell whether the process
    that made a folder still runs: `execute` skips the folders that somebody holds.
    """
    folders = {name.rstrip("/") for name in names if name.endswith("/")}
    actions = []
    for folder in sorted(folders):
        hidden = hidden_folder_of(folder)
        if hidden is None or (only is not None and hidden.name != only):
            continue
        if hidden.role == "replaced" and hidden.name not in folders:
            why = "the save that was to replace it is unfinished"
            actions.append(Action("restore", folder, why, hidden.name))
            folders.add(hidden.name)
        else:
            actions.append(Action("delete", folder, _WHY[hidden.role]))
    if only is not None:
        return actions
    for name in sorted(names):
        mark = mark_of(name)
        if mark and mark.role == "damaged" and step_name(mark.step) not in folders:
            actions.append(Action("delete", name, "a mark of a deleted checkpoint"))
    locks = [name for name in sorted(names) if held_of(name) is not None]
    return actions + [Action("delete", name, "the lock of a finished save") for name in locks]


def plan_deletions(names: Iterable[str]) -> list[Action]:
    """Plan to delete the files of checkpoints that have lost their names.

    No other process uses these, so the plan may be executed at any time except during a cleanup.
    """
    folders = [name.rstrip("/") for name in sorted(names)]
    return [
        Action("delete", folder, "it was set aside for deletion")
        for folder in folders
        if (hidden := hidden_folder_of(folder)) is not None and hidden.role == "removing"
    ]


def execute(store: Store, actions: Sequence[Action]) -> list[str]:
    """Execute a plan, except on folders that another process holds.

    Returns a line on each action that failed. The next cleanup tries again.
    """
    failed = []
    for action in actions:
        try:
            _execute(store, action)
        except NotFoundError:
            continue  # Another process has done it.
        except HoldfastError as error:
            failed.append(f"could not {action.verb} `{action.folder}`: {error.what}")
    return failed


def is_at_work(store: Store, folder: str) -> bool:
    """Whether a process, this one or another, holds the folder."""
    try:
        with store.hold(folder) as held:
            return held is False
    except HoldfastError:
        return False


def _execute(store: Store, action: Action) -> None:
    if mark_of(action.folder) is not None:
        store.remove(action.folder)
        return
    if held_of(action.folder) is not None:
        with suppress(ExistsError), store.lock(action.folder, ""):
            store.remove(action.folder)
        return
    with store.hold(action.folder) as held:
        hidden = hidden_folder_of(action.folder)
        if held is None and hidden is not None and hidden.role == "attempt":
            raise StorageError("this file system cannot tell whether a save is writing to it")
        if held is False:
            return
        if action.verb == "restore":
            store.rename(action.folder, action.target)
        else:
            store.remove(_renamed_for_deletion(store, action.folder))


def _renamed_for_deletion(store: Store, folder: str) -> str:
    """Rename a folder before its files are deleted, and return its new name.

    A `.replaced` folder of which half is deleted must not be restored, nor an `.attempt` continued.
    """
    hidden = hidden_folder_of(folder)
    if hidden is None or hidden.role == "removing":
        return folder
    removing = str(replace(hidden, role="removing"))
    store.rename(folder, removing)
    return removing
