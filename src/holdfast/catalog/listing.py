"""Lists the checkpoints in a folder, and finds the one that a run would resume from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from holdfast.catalog.catalog import location, read_manifest, steps_in
from holdfast.catalog.findings import (
    NAMED_MAX,
    is_unreadable,
    kind_of,
    misnumbered,
    why_not_resumable,
)
from holdfast.catalog.marks import damaged_steps, pinned_steps
from holdfast.catalog.open_any import is_checkpoint, open_any, other_checkpoints
from holdfast.catalog.seal import is_sealed, open_sealed
from holdfast.catalog.steady import is_deleted, read_steadily
from holdfast.catalog.tier import local_store
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.manifest import Manifest
from holdfast.format.names import (
    TIER,
    hidden_folder_of,
    number_of,
    step_name,
    step_of_folder,
    steps_among,
)
from holdfast.format.timings import Stage
from holdfast.storage.listed import ListedStore
from holdfast.storage.store import Linking, Links, ReadStore

CheckpointState = Literal["good", "damaged", "unreadable", "attempt", "local"]


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One checkpoint, or an unfinished save."""

    name: str
    step: int | None
    state: CheckpointState
    """State of the checkpoint. `unreadable`: files cannot be read now, and may be undamaged.
    `attempt`: an unfinished save or deletion. `local`: a checkpoint that only the fast tier on this
    host has."""

    kind: Literal["full", "model", "hf"] | None = None
    """Kind of the checkpoint: `full` (a whole training state), `model` (the model alone) or `hf` (a
    Hugging Face folder)."""

    nbytes: int | None = None
    written_nbytes: int | None = None
    """Bytes that the save has written: `nbytes` without the shared files, which were linked
    instead."""

    created: str | None = None
    """Time of the commit: ISO 8601, UTC."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    """Parallelism of the run that wrote the checkpoint. `world_size` is the number of ranks."""

    pinned: bool = False
    """Whether the checkpoint is marked `pinned`."""

    problem: str | None = None
    """Description of the problem; None if there is none."""

    why_not: str | None = None
    """Reason why no run can resume from the checkpoint; None if a run can."""

    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each data file, by name. A rank has several files if the run deduplicates, else
    one."""

    timings: Mapping[str, Stage] = field(default_factory=dict)
    """Duration of each stage of the save, over all ranks."""

    links: Mapping[str, str] = field(default_factory=dict)
    """For each data file that other checkpoints share by hard links, by name: a text that
    identifies the file, and is equal in all these checkpoints."""


def row_of(store: ReadStore, key: str) -> CheckpointRow:
    """Describe the checkpoint in folder `key` of the store, without its marks."""
    name = key.rpartition("/")[2]
    sealed = is_sealed(store, key)
    step = number_of(name) if sealed else step_of_folder(name)

    def read(key: str, _: object = None) -> tuple[Manifest, bool]:
        if sealed:
            return open_sealed(store, key), False
        opened = open_any(store, key, check_files=True, entries=False)
        return opened.manifest, opened.hf is not None

    try:
        try:
            manifest, is_hf = read(key)
        except HoldfastError:
            if isinstance(store, ListedStore):
                raise  # `survey` reads again, without the cached names of a `ListedStore`.
            # Another process may be replacing the checkpoint. `read_steadily` then reads it again.
            # Not used at first, since its fingerprint takes as long as the read itself.
            manifest, is_hf = read_steadily(store, key, read)
    except HoldfastError as error:
        state: CheckpointState = "unreadable" if is_unreadable(error) else "damaged"
        return CheckpointRow(name, step, state, problem=error.what, why_not=error.what)
    return CheckpointRow(
        name=name,
        step=step,
        state="good",
        kind="hf" if is_hf else kind_of(manifest),
        nbytes=manifest.nbytes,
        created=manifest.created or None,
        layout=manifest.layout,
        problem=None if step is None else misnumbered(step, manifest),
        files=manifest.files,
        timings=manifest.timings,
        why_not=None if step is None else why_not_resumable(step, manifest),
        written_nbytes=manifest.nbytes - sum(manifest.files[f] for f in manifest.shared or ()),
        # Only runs that deduplicate share files: do not look up links for others.
        links={}
        if manifest.shared is None
        else {f: links.file for f, links in shared_files(store, key, manifest.files).items()},
    )


def shared_files(store: ReadStore, folder: str, files: Iterable[str]) -> dict[str, Links]:
    """Return, for those of `files` that other checkpoints share by hard links, the `Links` of
    the file: a text that identifies it, and the number of its names. Files that cannot be examined
    are left out."""
    found = {}
    if isinstance(store, ListedStore):
        store = store.store
    if isinstance(store, Linking):
        for file in files:
            with suppress(HoldfastError):
                links = store.links(f"{folder}/{file}")
                if links.count > 1:
                    found[file] = links
    return found


def used_bytes(rows: Iterable[CheckpointRow]) -> int:
    """Return the bytes of all checkpoints together. A file that several of them share counts
    once."""
    nbytes, seen = 0, set()
    for row in rows:
        nbytes += row.nbytes or 0
        for file, identity in row.links.items():
            if identity in seen:
                nbytes -= row.files[file]
            seen.add(identity)
    return nbytes


def survey(
    store: ReadStore, name: str, look_at: Callable[[ReadStore, str], CheckpointRow] = row_of
) -> list[CheckpointRow]:
    """List the checkpoints in a folder, oldest first, then those that only the fast tier has on
    this host, then unfinished saves and deletions.

    `look_at`: function that describes one checkpoint, for callers that cache its results.

    Raises:
        NotFoundError: there is no such folder, or it holds no checkpoint.
    """
    listed = ListedStore(store)
    keys, names = steps_in(listed, name), listed.list(name)
    published = {key.rpartition("/")[2] for key in keys}
    folders = [folder.rstrip("/") for folder in names]
    unfinished = [f for f in folders if hidden_folder_of(f) is not None and f not in published]
    damaged, pinned = damaged_steps(listed, name), pinned_steps(listed, name)
    rows = []
    for key in keys:
        row = look_at(listed, key)
        if row.state in ("damaged", "unreadable"):
            # Another process may have replaced or deleted the checkpoint since it was listed.
            if is_deleted(store, key):
                continue
            row = look_at(store, key)
        rows.append(_marked(row, damaged, pinned))
    if TIER in names:
        durable = {row.step for row in rows if row.state == "good" and row.step is not None}
        rows += local_rows(store, name, besides=durable)
    if not keys and not unfinished and not rows:
        raise NotFoundError(
            f"`{location(store, name)}` holds no step", hint=hint_without_steps(store, name, names)
        )
    return rows + [CheckpointRow(folder, None, "attempt") for folder in unfinished]


def local_rows(store: ReadStore, name: str, *, besides: Collection[int]) -> list[CheckpointRow]:
    """Describe the checkpoints in the fast tier of a run on this host, oldest first. `name`:
    durable folder of the run. The steps in `besides` and unreadable checkpoints are left out."""
    local = local_store(store, name)
    rows: list[CheckpointRow] = []
    if local is None:
        return rows
    for step, folder in steps_among(local.list()).items():
        if step not in besides:
            with suppress(HoldfastError):
                rows.append(_local_row(local, step, folder))
    return rows


def _local_row(local: ReadStore, step: int, folder: str) -> CheckpointRow:
    manifest = read_manifest(local, folder, entries=False)
    num_missing = len(manifest.files.keys() - {*local.list(folder)})
    why_not = why_not_resumable(step, manifest)
    if num_missing:
        why_not = f"{num_missing} of its {len(manifest.files)} files are on other hosts"
    return CheckpointRow(
        name=step_name(step),
        step=step,
        state="local",
        kind=kind_of(manifest),
        nbytes=manifest.nbytes,
        created=manifest.created or None,
        layout=manifest.layout,
        problem=None,
        files=manifest.files,
        timings=manifest.timings,
        why_not=why_not,
    )


def _marked(
    row: CheckpointRow, damaged: Mapping[int, str], pinned: Collection[int]
) -> CheckpointRow:
    if row.state in ("good", "unreadable") and row.step is not None and row.step in damaged:
        why = damaged[row.step]
        row = CheckpointRow(row.name, row.step, "damaged", problem=why, why_not=why)
    return replace(row, pinned=True) if row.step in pinned else row


def hint_without_steps(store: ReadStore, name: str, names: Sequence[str]) -> str:
    """Return the hint for folder `name`, in which no checkpoint of a run was found. `names`: files
    and folders in it."""
    if is_checkpoint(store, name):
        return f"it is a checkpoint itself: holdfast verify {location(store, name)}"
    found: list[str] = []
    for folder in (folder.rstrip("/") for folder in names if folder.endswith("/")):
        with suppress(HoldfastError):
            if steps_in(store, f"{name}/{folder}"):
                found.append(f"{location(store, name)}/{folder}")
        if len(found) > NAMED_MAX:
            break  # Enough for the message; there may be thousands.
    if found:
        more = " and in more folders" if len(found) > NAMED_MAX else ""
        return f"there are some in {', '.join(found[:NAMED_MAX])}{more}"
    others = other_checkpoints(store, name)
    if others:
        command = f"holdfast verify {location(store, name)}"
        return f"no `step-N`, but checkpoints: {', '.join(others[:10])}; {command}"
    return f"found: {', '.join(names[:10]) or 'nothing'}"


def resumable(rows: Sequence[CheckpointRow]) -> int | None:
    """Return the newest step among `rows` that a run could resume from; None if there is none. Data
    is not read for this."""
    steps = [row.step for row in rows if row.why_not is None and row.step is not None]
    return max(steps, default=None)
