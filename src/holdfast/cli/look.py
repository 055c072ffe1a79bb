"""Any checkpoint, whoever wrote it, as the manifest that a verb looks at. Reads no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from holdfast.catalog.catalog import place, read_manifest, steps_in
from holdfast.catalog.findings import Format
from holdfast.catalog.pieces import no_checkpoint
from holdfast.catalog.verify import format_of
from holdfast.engine.root import open_for_reading
from holdfast.engine.source import Source
from holdfast.format import safetensors, torchfile
from holdfast.format.manifest import Manifest
from holdfast.storage.store import ReadStore


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint, and what is known of it without reading its data."""

    format: Format
    source: Source
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of tensors in a `.pt` file that do not lie row by row."""

    file: str = ""
    """Within `source.folder`, where the checkpoint is one file."""

    @property
    def where(self) -> str:
        return place(self.source.store, self.source.folder) + (f"/{self.file}" * bool(self.file))

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest


def look(path: str) -> Seen:
    """What the checkpoint at a path, or a URL, holds: a step of Holdfast or of stock DCP, a folder
    or file of safetensors, a `.pt` file.

    Raises:
        NotFoundError: nothing there, or no checkpoint.
        DamagedError, FormatError: its index cannot be read.
    """
    return look_at(*open_for_reading(path))


def look_at(store: ReadStore, name: str) -> Seen:
    """As `look`, by the checkpoint's store and its name there."""
    form = format_of(store, name)
    where = place(store, name)
    if form is None:
        steps = steps_in(store, name) if is_folder(store, name) else []
        hint = "`holdfast list FOLDER` shows the steps of a run's checkpoint folder"
        if steps:
            hint = f"its newest step: {place(store, steps[-1])}"
        raise no_checkpoint(store, name, hint=hint)
    if form in ("holdfast", "dcp"):
        return Seen(form, Source(store, name, read_manifest(store, name)))
    if is_folder(store, name):
        # Not at the top: its tables of names need numpy, for which nothing else waits.
        from holdfast.hf.folder import open_folder

        return Seen(form, Source(store, name, open_folder(store, name).manifest))
    fetch, nbytes = partial(_fetch, store, name), store.size(name)
    above, _, file = where.rpartition("/")
    around = open_for_reading(above)  # What is read below is read from files in a folder.
    if form == "torch":
        found = torchfile.read_file(fetch, nbytes, file=file, where=where)
        return Seen(form, Source(*around, found.manifest), found.strides, file)
    manifest = safetensors.read_file(fetch, nbytes, file=file, where=where)
    return Seen(form, Source(*around, manifest), file=file)


def is_folder(store: ReadStore, name: str) -> bool:
    """Whether there is a folder of that name."""
    above, _, last = name.rpartition("/")
    return f"{last}/" in store.list(above)


def _fetch(store: ReadStore, key: str, offset: int, nbytes: int) -> bytes:
    return store.read(key, offset, offset + nbytes)
