"""The checkpoints in a folder, and which of them a resume takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from holdfast.catalog.catalog import place, steps_in
from holdfast.catalog.findings import kind_of
from holdfast.catalog.marks import damaged_steps, pinned_steps
from holdfast.catalog.open_any import format_of, open_any
from holdfast.catalog.resumable import misnumbered, why_not_resumable
from holdfast.catalog.steady import is_deleted, read_steadily
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.names import aside_of, step_standing_in
from holdfast.format.timings import Stage
from holdfast.storage.store import ReadStore


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One step, or a save that did not come to its end."""

    name: str
    step: int | None
    state: Literal["good", "damaged", "attempt"]
    kind: Literal["full", "model", "hf"] | None = None
    """`full` can be resumed from, `model` holds the model alone, `hf` holds it as Hugging Face's
    folders do."""

    nbytes: int | None = None
    created: str | None = None
    """ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """What wrote it: `world_size` is the number of ranks."""

    pinned: bool = False
    """Whether retention never removes it."""

    problem: str | None = None
    """What is wrong, where something is."""

    why_not: str | None = None
    """Reason why no run can go on from it; None where one can."""

    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each data file: what each rank has written."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """What each stage of its save has taken, over all ranks."""


LookAt = Callable[[ReadStore, str], CheckpointRow]
"""`look_at(store, key)`: what is known of one step, but for its marks."""


def survey(store: ReadStore, name: str, look_at: LookAt | None = None) -> list[CheckpointRow]:
    """The steps below a folder, oldest first, then what is no step yet, or no longer. `look_at`
    stands in for `row_of`, should the caller know some of them.

    Raises:
        NotFoundError: no such folder, or none with a step.
    """
    steps = steps_in(store, name)
    there = store.list(name)
    listed = {step.rpartition("/")[2] for step in steps}
    folders = [one.rstrip("/") for one in there]
    asides = [one for one in folders if aside_of(one) is not None and one not in listed]
    if not steps and not asides:
        raise NotFoundError(
            f"`{place(store, name)}` holds no step", hint=hint_without_steps(store, name, there)
        )
    damaged, pinned = damaged_steps(store, name), pinned_steps(store, name)
    found = [(step, (look_at or row_of)(store, step)) for step in steps]
    rows = [
        _marked(row, damaged, pinned)
        for step, row in found
        # Retention may have deleted it since it was listed.
        if row.state != "damaged" or not is_deleted(store, step)
    ]
    return rows + [CheckpointRow(one, None, "attempt") for one in asides]


def _marked(
    row: CheckpointRow, damaged: Mapping[int, str], pinned: Collection[int]
) -> CheckpointRow:
    if row.state == "good" and row.step is not None and row.step in damaged:
        why = damaged[row.step]
        row = CheckpointRow(row.name, row.step, "damaged", problem=why, why_not=why)
    return replace(row, pinned=row.step in pinned)


def hint_without_steps(store: ReadStore, name: str, there: Sequence[str]) -> str:
    """Next step where a folder was to hold steps, and holds none."""
    if _is_checkpoint(store, name):
        return f"it is a checkpoint itself: holdfast verify {place(store, name)}"
    folders = [one.rstrip("/") for one in there if one.endswith("/")]
    for below in folders:
        if _holds_steps(store, f"{name}/{below}"):
            return f"there are some in {place(store, name)}/{below}"
    held = [below for below in folders if _is_checkpoint(store, f"{name}/{below}")]
    if held:
        one = f"holdfast verify {place(store, name)}/{held[-1]}"
        return f"no `step-N`, but checkpoints: {', '.join(held[:10])}; {one}"
    return f"found: {', '.join(there[:10]) or 'nothing'}"


def _is_checkpoint(store: ReadStore, name: str) -> bool:
    try:
        return format_of(store, name) is not None
    except HoldfastError:
        return False


def _holds_steps(store: ReadStore, name: str) -> bool:
    try:
        return bool(steps_in(store, name))
    except HoldfastError:
        return False


def row_of(store: ReadStore, key: str) -> CheckpointRow:
    """What is known of one step, but for its marks."""
    name = key.rpartition("/")[2]
    step = step_standing_in(name)
    try:
        opened = read_steadily(
            store, key, lambda: open_any(store, key, check_files=True, entries=False)
        )
    except HoldfastError as error:
        return CheckpointRow(name, step, "damaged", problem=error.what, why_not=error.what)
    manifest = opened.manifest
    return CheckpointRow(
        name,
        step,
        "good",
        "hf" if opened.hf is not None else kind_of(manifest),
        manifest.nbytes,
        manifest.created or None,
        manifest.layout,
        problem=None if step is None else misnumbered(step, manifest),
        files=manifest.files,
        timings=manifest.timings,
        why_not=None if step is None else why_not_resumable(step, manifest),
    )


def resumable(rows: Sequence[CheckpointRow]) -> int | None:
    """The step that a resume takes, as far as can be known without reading data."""
    steps = [row.step for row in rows if row.why_not is None and row.step is not None]
    return max(steps, default=None)
