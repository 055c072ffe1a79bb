"""Cleans up after killed processes: `plan_cleanup` plans the actions, `execute` carries them
out."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import (
    TAKING,
    HiddenFolder,
    HiddenRole,
    held_of,
    hidden_folder_of,
    mark_of,
    step_name,
)
from holdfast.storage.store import Store

logger: logging.Logger = logging.getLogger("holdfast")

_WHY: dict[HiddenRole, str] = {
    "attempt": "an unfinished save",
    "replaced": "a newer save has replaced it",
    "removing": "an unfinished deletion",
}
"""Reason to delete a hidden folder, by the word with which its name begins."""


@dataclass(frozen=True, slots=True)
class Action:
    """One deletion or rename of a cleanup."""

    verb: Literal["delete", "restore"]
    """Kind of action: delete a folder or file, or give a checkpoint its name back."""

    folder: str
    """Name of the folder or file."""

    why: str
    """Reason, for messages."""

    role: HiddenRole | None = None
    """First word in the name of a hidden folder, such as `attempt`; None for a file."""


def plan_cleanup(names: Collection[str], *, only: str | None = None) -> list[Action]:
    """Plan the cleanup of a folder, given the names of the files and folders in it. Names of
    folders end in `/`.

    `only`: name of a checkpoint; the plan is then limited to its leftovers. The plan may include
    folders of processes that still run: `execute` skips folders that another process holds.
    """
    folders = {name.rstrip("/") for name in names if name.endswith("/")}
    actions = []
    for folder in sorted(folders):
        hidden = hidden_folder_of(folder)
        if hidden is None or (only is not None and hidden.name != only):
            continue
        if hidden.role == "replaced" and hidden.name not in folders:
            why = "the save that was to replace it is unfinished"
            actions.append(Action("restore", folder, why, hidden.role))
            folders.add(hidden.name)
        else:
            actions.append(Action("delete", folder, _WHY[hidden.role], hidden.role))
    for name in sorted(names) if only is None else ():
        mark = mark_of(name)
        if mark and mark.role == "damaged" and step_name(mark.step) not in folders:
            actions.append(Action("delete", name, "a mark of a deleted checkpoint"))
        if held_of(name.removesuffix(TAKING)) is not None:
            actions.append(Action("delete", name, "the lock of a finished save"))
    return actions


def execute(store: Store, actions: Sequence[Action]) -> list[str]:
    """Execute the actions of a plan, except on folders that another process holds.

    Returns one line for each failed action. The next cleanup tries these actions again.
    """
    failed = []
    for action in actions:
        try:
            _execute(store, action)
        except NotFoundError:
            continue  # Another process has carried out this action.
        except HoldfastError as error:
            failed.append(f"could not {action.verb} `{action.folder}`: {error.what}")
    return failed


def put_in_order(store: Store) -> None:
    """Clean up after killed runs, and log every action. No other process may save to the store
    meanwhile."""
    actions = plan_cleanup(store.list())
    for action in actions:
        logger.info("%s %s: %s", action.verb, action.folder, action.why)
    for problem in execute(store, actions):
        logger.warning("%s; the next start tries again", problem)


def is_at_work(store: Store, folder: str) -> bool:
    """Return whether a process holds the folder: this one or another."""
    try:
        with store.hold(folder) as held:
            return held is False
    except HoldfastError:
        return False


def _execute(store: Store, action: Action) -> None:
    name, hidden = action.folder, hidden_folder_of(action.folder)
    if mark_of(name) is not None:
        store.remove(name)
    elif hidden is None:
        with suppress(ExistsError), store.lock(name, ""):
            store.remove(name)
    else:
        with store.hold(name) as held:
            if held is None and hidden.role == "attempt":
                raise StorageError("this file system cannot tell whether a save is writing to it")
            if held is False:
                return
            if action.verb == "restore":
                store.publish(name, hidden.name)
                return
            delete_hidden(store, hidden)


def delete_hidden(store: Store, folder: HiddenFolder) -> None:
    """Rename a hidden folder to a `.removing` name, then delete it.

    A deletion that is killed halfway would otherwise leave a `.replaced` checkpoint that a cleanup
    restores, or an `.attempt` that a process continues, with files missing.
    """
    store.remove(store.unpublish(str(folder), str(replace(folder, role="removing"))))
