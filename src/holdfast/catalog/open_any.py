"""Opens any checkpoint, whoever wrote it. Reads its index, none of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from holdfast.catalog.catalog import open_manifest, place, read_manifest, steps_in
from holdfast.catalog.findings import Format
from holdfast.catalog.hf_folder import HFFolder, open_hf_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.pieces import check_whole_checkpoint, no_checkpoint
from holdfast.catalog.source import Source
from holdfast.errors import NotFoundError, StorageError
from holdfast.format import safetensors, torchfile
from holdfast.format.manifest import Manifest
from holdfast.format.names import MANIFEST, METADATA
from holdfast.storage.store import ReadStore

_FILES = {"torch": "written by torch.save", "safetensors": "of safetensors"}
"""What a file of each format is, for people."""


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A checkpoint of any format, open for reading."""

    format: Format
    source: Source
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Strides of the tensors in a `.pt` file that are not row-major."""

    file: str = ""
    """Name of the file within `source.folder`, where the checkpoint is a single file."""

    hf: HFFolder | None = None
    """Configuration and notes, where the checkpoint is a Hugging Face folder."""

    @property
    def where(self) -> str:
        """Path or URL of the checkpoint."""
        return place(self.source.store, self.source.folder) + (f"/{self.file}" * bool(self.file))

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest


def open_any(
    store: ReadStore, name: str, *, check_files: bool = False, entries: bool = True
) -> OpenCheckpoint:
    """Open the checkpoint `name` of a store: a step of Holdfast or of stock DCP, a Hugging Face
    folder, a safetensors file or a `.pt` file.

    `check_files`: make sure that every file of a step is there in full. `entries`: read what a
    manifest says of each tensor and value, too.

    Raises:
        NotFoundError: nothing there, or no checkpoint.
        UsageError: a file that is a piece of a checkpoint.
        DamagedError, FormatError: its index cannot be read.
    """
    form = format_of(store, name)
    if form is None:
        raise no_checkpoint(store, name, hint=_hint(store, name))
    if form in ("holdfast", "dcp"):
        read = open_manifest if check_files else read_manifest
        return OpenCheckpoint(form, Source(store, name, read(store, name, entries=entries)))
    if is_folder(store, name):
        folder = open_hf_folder(store, name)
        return OpenCheckpoint(form, Source(store, name, folder.manifest), hf=folder)
    return _open_file(store, name, form)


def _open_file(store: ReadStore, name: str, form: Format) -> OpenCheckpoint:
    where = place(store, name)
    folder, _, file = where.rpartition("/")
    fetch, nbytes = partial(_fetch, store, name), store.size(name)
    # A source reads files in a folder, and this one may lie at the top of its store.
    around = open_for_reading(folder)
    if form == "torch":
        found = torchfile.read_file(fetch, nbytes, file=file, where=where)
        return OpenCheckpoint(form, Source(*around, found.manifest), found.strides, file)
    manifest = safetensors.read_file(fetch, nbytes, file=file, where=where)
    return OpenCheckpoint(form, Source(*around, manifest), file=file)


def format_of(store: ReadStore, name: str) -> Format | None:
    """Format of a folder or file; None where it is no checkpoint.

    Raises:
        NotFoundError: nothing is there.
        UsageError: a file that is a piece of a checkpoint.
    """
    above, _, last = name.rpartition("/")
    there = store.list(above)
    if last in there:
        check_whole_checkpoint(store, name)
        start = store.read(name, 0, 9)
        if start[:4] == b"PK\3\4" or start[:1] == b"\x80":
            return "torch"
        return "safetensors" if name.endswith(safetensors.SUFFIX) or start[8:] == b"{" else None
    if f"{last}/" not in there:
        raise NotFoundError(f"nothing at `{place(store, name)}`")
    files = store.list(name)
    if MANIFEST in files:
        return "holdfast"
    if METADATA in files:
        return "dcp"
    safe = any(
        file.endswith((safetensors.SUFFIX, f"{safetensors.SUFFIX}.index.json")) for file in files
    )
    return "safetensors" if safe else None


def check_folder(store: ReadStore, name: str) -> None:
    """Refuse a file where the folder of a checkpoint, or of checkpoints, is wanted. Says nothing of
    a place where nothing is.

    Raises:
        NotFoundError: says what the file is, and what can be done with it.
        UsageError: a file that is a piece of a checkpoint.
    """
    above, _, last = name.rpartition("/")
    try:
        if last not in store.list(above):
            return
        form = format_of(store, name)
    except (NotFoundError, StorageError):
        return
    where = place(store, name)
    if form is None:
        raise no_checkpoint(store, name, hint="pass the folder of the checkpoint")
    raise NotFoundError(
        f"`{where}` is a file, {_FILES[form]}; a folder is wanted",
        hint=f"`holdfast convert {where} FOLDER` makes a checkpoint of it; `holdfast show {where}` "
        "lists what it holds",
    )


def is_folder(store: ReadStore, name: str) -> bool:
    """Whether `name` is a folder."""
    above, _, last = name.rpartition("/")
    return f"{last}/" in store.list(above)


def _hint(store: ReadStore, name: str) -> str:
    steps = steps_in(store, name) if is_folder(store, name) else []
    if steps:
        return f"its newest step: {place(store, steps[-1])}"
    return "`holdfast list FOLDER` shows the steps of a run's checkpoint folder"


def _fetch(store: ReadStore, key: str, offset: int, nbytes: int) -> bytes:
    return store.read(key, offset, offset + nbytes)
