"""Marks: what is known of a step, kept beside it. A mark is a file whose name says it all, so that
one cut off by a power failure says no less; its content is a note for people."""

from __future__ import annotations

from holdfast.errors import HoldfastError
from holdfast.format.names import Mark, mark_of
from holdfast.storage.store import ReadStore, Store

_NOTE_BYTES_MAX = 4096


def marks_in(store: ReadStore, folder: str = "") -> list[Mark]:
    """The marks that stand in a folder of steps."""
    found = (mark_of(name) for name in store.list(folder))
    return [mark for mark in found if mark is not None]


def pinned_steps(store: ReadStore, folder: str = "") -> set[int]:
    """Steps that retention never removes."""
    return {mark.step for mark in marks_in(store, folder) if mark.role == "pinned"}


def damaged_steps(store: ReadStore, folder: str = "") -> dict[int, str]:
    """Steps whose data was found damaged, each with a line on what was found."""
    found = {}
    for mark in marks_in(store, folder):
        if mark.role == "damaged":
            key = f"{folder}/{mark}" if folder else str(mark)
            note = _note(store, folder, mark, key)
            found[mark.step] = f"found damaged before: {note or 'no more is known'} (`{mark}`)"
    return found


def _note(store: ReadStore, folder: str, mark: Mark, key: str) -> str:
    """What a mark says. One that cannot be read says no less by its name."""
    try:
        # Who may write here may not have others read what lies elsewhere to him.
        if store.leads_out(folder, str(mark)):
            return "a link to elsewhere"
        return store.read(key, 0, _NOTE_BYTES_MAX).decode(errors="replace").strip()
    except HoldfastError as error:
        return error.what


def pin(store: Store, step: int) -> None:
    """Keep a step whatever retention is told, until `unpin`."""
    _put(store, Mark("pinned", step), "")


def unpin(store: Store, step: int) -> None:
    """Leave a step to retention again."""
    _clear(store, Mark("pinned", step))


def mark_damaged(store: Store, step: int, note: str) -> None:
    """Let listings and later runs know at once that data of this step is damaged, until it is saved
    again, or `clear_damaged`."""
    _put(store, Mark("damaged", step), note)


def clear_damaged(store: Store, step: int) -> None:
    """Have a step tried again."""
    _clear(store, Mark("damaged", step))


def _put(store: Store, mark: Mark, note: str) -> None:
    if mark in marks_in(store):
        return
    data = note.encode(errors="replace")[:_NOTE_BYTES_MAX]
    with store.create(str(mark), len(data)) as writer:
        writer.write(0, [data])
    store.sync("")


def _clear(store: Store, mark: Mark) -> None:
    if mark in marks_in(store):
        store.remove(str(mark))
        store.sync("")
