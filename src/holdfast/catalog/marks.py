"""Marks: small files beside checkpoints that say `pinned` or `damaged`.

The name of the file is the mark. Its content is a note for people, which a power cut may truncate
without harm.
"""

from __future__ import annotations

from holdfast.errors import HoldfastError
from holdfast.format.names import Mark, mark_of
from holdfast.storage.store import ReadStore, Store

_NOTE_BYTES_MAX = 4096


def marks_in(store: ReadStore, folder: str = "") -> list[Mark]:
    """The marks in a folder of checkpoints."""
    return [mark for mark in map(mark_of, store.list(folder)) if mark is not None]


def pinned_steps(store: ReadStore, folder: str = "") -> set[int]:
    """Steps that retention never deletes."""
    return {mark.step for mark in marks_in(store, folder) if mark.role == "pinned"}


def damaged_steps(store: ReadStore, folder: str = "") -> dict[int, str]:
    """Steps that were found damaged, each with a line that says how."""
    damaged = {}
    for mark in marks_in(store, folder):
        if mark.role == "damaged":
            note = _note(store, folder, mark) or "no more is known"
            damaged[mark.step] = f"found damaged before: {note} (`{mark}`)"
    return damaged


def _note(store: ReadStore, folder: str, mark: Mark) -> str:
    """The note in a mark, or the reason why it cannot be read."""
    try:
        # The writer of this folder could link to a file that only its reader may read.
        if store.leads_out(folder, str(mark)):
            return "a link to elsewhere"
        key = f"{folder}/{mark}" if folder else str(mark)
        return store.read(key, 0, _NOTE_BYTES_MAX).decode(errors="replace").strip()
    except HoldfastError as error:
        return error.what


def pin(store: Store, step: int) -> None:
    """Keep a checkpoint from retention, until its mark is deleted."""
    mark = Mark("pinned", step)
    if mark not in marks_in(store):
        with store.create(str(mark), 0):
            pass
        store.sync("")


def mark_damaged(store: Store, step: int, note: str) -> None:
    """Mark a checkpoint as damaged, until its step is saved again, or `clear_damaged`."""
    mark = Mark("damaged", step)
    if mark not in marks_in(store):
        data = note.encode(errors="replace")[:_NOTE_BYTES_MAX]
        with store.create(str(mark), len(data)) as writer:
            writer.write(0, [data])
        store.sync("")


def clear_damaged(store: Store, step: int) -> None:
    """Delete the mark `damaged` of a checkpoint."""
    mark = Mark("damaged", step)
    if mark in marks_in(store):
        store.remove(str(mark))
        store.sync("")
