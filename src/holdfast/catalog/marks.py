"""Marks: small files beside checkpoints that say `pinned` or `damaged`.

Only the name of the file counts. Its content is a note for people. A power cut may truncate the
note, which does no harm.
"""

from __future__ import annotations

from holdfast.errors import HoldfastError
from holdfast.format.names import Mark, mark_of
from holdfast.storage.store import ReadStore, Store

_NOTE_BYTES_MAX = 4096


def marks_in(store: ReadStore, folder: str = "") -> list[Mark]:
    """Return the marks in folder `folder`. Each is about one of the checkpoints in this folder."""
    return [mark for mark in map(mark_of, store.list(folder)) if mark is not None]


def pinned_steps(store: ReadStore, folder: str = "") -> set[int]:
    """Return the steps with the mark `pinned`, which retention never deletes."""
    return {mark.step for mark in marks_in(store, folder) if mark.role == "pinned"}


def damaged_steps(store: ReadStore, folder: str = "") -> dict[int, str]:
    """Return the steps with the mark `damaged`, each with one line about the damage."""
    damaged = {}
    for mark in marks_in(store, folder):
        if mark.role == "damaged":
            note = _note(store, folder, mark) or "no more is known"
            damaged[mark.step] = f"found damaged before: {note} (`{mark}`)"
    return damaged


def _note(store: ReadStore, folder: str, mark: Mark) -> str:
    """Return the note in a mark, or the reason why the note cannot be read."""
    try:
        # In a folder from a stranger, a mark may be a link to a private file of the user.
        if store.leads_out(folder, str(mark)):
            return "a link to elsewhere"
        key = f"{folder}/{mark}" if folder else str(mark)
        return store.read(key, 0, _NOTE_BYTES_MAX).decode(errors="replace").strip()
    except HoldfastError as error:
        return error.what


def pin(store: Store, step: int) -> None:
    """Mark a checkpoint as pinned, so that retention does not delete it until the mark is
    deleted."""
    mark = Mark("pinned", step)
    if mark not in marks_in(store):
        with store.create(str(mark), 0):
            pass
        store.sync("")


def mark_damaged(store: Store, step: int, note: str) -> None:
    """Mark a checkpoint as damaged. The mark stays until the step is saved again, or until
    `clear_damaged` deletes it."""
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
