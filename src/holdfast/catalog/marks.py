"""Marks: what is known of a step, kept beside it. A mark is a file whose name says it all, so that
one cut off by a power failure says no less; its content is a note for people."""

from __future__ import annotations

from holdfast.errors import HoldfastError
from holdfast.format.checksum import checksum, to_hex
from holdfast.format.names import MANIFEST, METADATA, Mark, mark_of, step_name
from holdfast.storage.store import ReadStore, Store

_NOTE_BYTES_MAX = 4096
_INDEX_BYTES_MAX = 1 << 30


def marks_in(store: ReadStore, folder: str = "") -> list[Mark]:
    """The marks that stand in a folder of steps."""
    found = (mark_of(name) for name in store.list(folder))
    return [mark for mark in found if mark is not None]


def pinned_steps(store: ReadStore, folder: str = "") -> set[int]:
    """Steps that retention never removes."""
    return {mark.step for mark in marks_in(store, folder) if mark.role == "pinned"}


def damaged_steps(store: ReadStore, folder: str = "") -> dict[int, str]:
    """Steps whose data was found damaged, each with a line on what was found. A mark that is about
    an earlier save of a step is not counted."""
    found = {}
    for mark in marks_in(store, folder):
        if mark.role == "damaged" and mark.digest == _digest(store, folder, mark.step):
            key = _below(folder, str(mark))
            note = store.read(key, 0, _NOTE_BYTES_MAX).decode(errors="replace").strip()
            found[mark.step] = f"found damaged before: {note or 'no more is known'} (`{mark}`)"
    return found


def pin(store: Store, step: int) -> None:
    """Keep a step whatever retention is told, until `unpin`."""
    _put(store, Mark("pinned", step), "")


def unpin(store: Store, step: int) -> None:
    """Leave a step to retention again."""
    if step in pinned_steps(store):
        store.remove(str(Mark("pinned", step)))


def mark_damaged(store: Store, step: int, note: str) -> None:
    """Let listings and later runs know at once that data of this step is damaged."""
    digest = _digest(store, "", step)
    if digest:
        _put(store, Mark("damaged", step, digest), note)


def clear_damaged(store: Store, step: int) -> None:
    """Forget that a step was damaged: it was saved again, or is gone."""
    for mark in marks_in(store):
        if (mark.role, mark.step) == ("damaged", step):
            store.remove(str(mark))


def _put(store: Store, mark: Mark, note: str) -> None:
    if str(mark) in store.list():
        return
    data = note.encode(errors="replace")[:_NOTE_BYTES_MAX]
    with store.create(str(mark), len(data)) as writer:
        writer.write(0, [data])
    store.sync("")


def _digest(store: ReadStore, folder: str, step: int) -> str:
    """Of the index of a step; empty where it has none that can be read."""
    for index in (MANIFEST, METADATA):
        key = _below(folder, f"{step_name(step)}/{index}")
        try:
            return to_hex([checksum(store.read(key, 0, min(store.size(key), _INDEX_BYTES_MAX)))])
        except HoldfastError:
            continue
    return ""


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
