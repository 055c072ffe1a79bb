"""Putting a folder in order: first a plan, which can be looked at, then its execution."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import aside_of, held_of, mark_of, step_name
from holdfast.storage.store import Store


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do."""

    verb: Literal["remove", "restore"]
    folder: str
    why: str
    target: str = ""
    """Name under which `restore` puts the folder back."""


def plan_cleanup(names: Collection[str], *, only: str | None = None) -> list[Action]:
    """What a killed process may have left, from the names that are there (folders end in `/`).

    `only` limits it to what was to become, or was, the checkpoint of that name. Names alone do not
    tell a dead process from one at work: `execute` leaves what anybody holds.
    """
    folders = {name.rstrip("/") for name in names if name.endswith("/")}
    actions = []
    for folder in sorted(folders):
        aside = aside_of(folder)
        if aside is None or (only is not None and aside.name != only):
            continue
        if aside.role == "replaced" and aside.name not in folders:
            why = "the save that was to replace it never came to its end"
            actions.append(Action("restore", folder, why, aside.name))
            folders.add(aside.name)
        else:
            why = {
                "attempt": "a save that never came to its end",
                "replaced": "a newer save has its name",
                "removing": "a removal that never came to its end",
            }[aside.role]
            actions.append(Action("remove", folder, why))
    if only is None:
        actions += _stale_marks(names, folders)
        actions += _locks(names)
    return actions


def plan_removals(names: Iterable[str]) -> list[Action]:
    """Checkpoints that have lost their names and wait to be deleted. Nobody else looks at them, so
    this may be done beside anything but a sweep."""
    asides = map(aside_of, (name.rstrip("/") for name in sorted(names)))
    return [
        Action("remove", str(aside), "it was let go")
        for aside in asides
        if aside is not None and aside.role == "removing"
    ]


def _stale_marks(names: Collection[str], folders: Collection[str]) -> list[Action]:
    marks = [mark for mark in map(mark_of, sorted(names)) if mark is not None]
    return [
        Action("remove", str(mark), "a mark of a step that is gone")
        for mark in marks
        if mark.role == "damaged" and step_name(mark.step) not in folders
    ]


def _locks(names: Collection[str]) -> list[Action]:
    held = [name for name in sorted(names) if held_of(name) is not None]
    return [Action("remove", name, "the lock of a save that is over") for name in held]


def execute(store: Store, actions: Sequence[Action]) -> list[str]:
    """Do it, but for what another process holds. What could not be done comes back as a line each;
    the next sweep tries again."""
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
    """Whether another process, or this one, is at work on a folder that is set aside."""
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
        aside = aside_of(action.folder)
        if held is None and aside is not None and aside.role == "attempt":
            raise StorageError("this file system cannot tell whether a save is at work on it")
        if held is not False:
            _change(store, action)


def _change(store: Store, action: Action) -> None:
    if action.verb == "restore":
        store.rename(action.folder, action.target)
    else:
        store.remove(_out_of_reach(store, action.folder))


def _out_of_reach(store: Store, folder: str) -> str:
    """The folder under a name from which nothing is restored, and that nobody goes on with: half of
    it may be all that is left when its successor goes."""
    aside = aside_of(folder)
    if aside is None or aside.role == "removing":
        return folder
    removing = str(replace(aside, role="removing"))
    store.rename(folder, removing)
    return removing
