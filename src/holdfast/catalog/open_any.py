"""Opens a checkpoint of any format. Reads the index, but no data."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from holdfast.catalog.catalog import connect_rows, location, open_manifest, read_manifest, steps_in
from holdfast.catalog.findings import NAMED_MAX, Format, named
from holdfast.catalog.hf_folder import HFFolder, open_hf_folder
from holdfast.catalog.nested import checkpoint_in
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.pieces import check_whole_checkpoint, format_among, no_checkpoint
from holdfast.catalog.source import Source, fetcher
from holdfast.catalog.steady import UNREADABLE, fingerprint, read_steadily
from holdfast.catalog.zero_folder import open_zero_folder
from holdfast.errors import HoldfastError, NotFoundError, StorageError
from holdfast.format import archive, safetensors, torchfile
from holdfast.format.manifest import Manifest
from holdfast.format.names import step_of_folder
from holdfast.format.seal import SEAL
from holdfast.format.torchfile import TorchFile
from holdfast.storage.store import ReadStore

_FILES = {"torch": "written by torch.save", "safetensors": "of safetensors"}
"""Format of a single file, in the words of messages."""

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", safetensors.SUFFIX)
"""Usual ends of the names of checkpoints that are single files."""


@dataclass(frozen=True, slots=True)
class OpenCheckpoint:
    """A checkpoint of any format."""

    format: Format
    source: Source
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Strides of the tensors that are not row-major. Only files of `torch.save` have such
    tensors."""

    file: str = ""
    """Name of the file in `source.folder`, if the checkpoint is a single file; else empty."""

    hf: HFFolder | None = None
    """Contents of the folder, if the checkpoint is a Hugging Face folder; else None."""

    values: Mapping[str, object] = field(default_factory=dict)
    """Values of files of `torch.save`, by name: see `TorchFile.values`."""

    notes: tuple[str, ...] = ()
    """Notes for the user, such as ignored files and objects."""

    @property
    def where(self) -> str:
        """Path or URL of the checkpoint."""
        return location(self.source.store, self.source.folder) + (f"/{self.file}" * bool(self.file))

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest


@dataclass(frozen=True, slots=True)
class Opened:
    """Manifest of a checkpoint, and a fingerprint that changes when the checkpoint is replaced."""

    folder: str
    """Folder of the checkpoint, below the root of the store."""

    manifest: Manifest
    fingerprint: object
    """Result of `steady.fingerprint` when the checkpoint was opened."""

    @property
    def step(self) -> int | None:
        """Step number in the name of the folder; None if it has none."""
        return step_of_folder(self.folder.rpartition("/")[2])

    def source(self, store: ReadStore) -> Source:
        """Return a `Source` to read data from. `store`: this rank's object for the store in which
        the checkpoint was opened."""
        connect_rows(store, self.folder, self.manifest)
        return Source(store, self.folder, self.manifest)

    def was_replaced(self, store: ReadStore) -> bool:
        """Whether the checkpoint has been replaced or deleted since it was opened."""
        return fingerprint(store, self.folder) != self.fingerprint


def open_in(
    store: ReadStore, name: str, read: Callable[[ReadStore, str], Manifest] = open_manifest
) -> Opened:
    """Open the checkpoint `name` of a store. `read`: function that reads its manifest. Try again if
    another process replaces the checkpoint meanwhile."""
    try:
        return read_steadily(
            store, name, lambda folder, found: Opened(folder, read(store, folder), found)
        )
    except UNREADABLE:
        check_folder(store, name)
        raise


def open_any(
    store: ReadStore, name: str, *, check_files: bool = False, entries: bool = True
) -> OpenCheckpoint:
    """Open the checkpoint `name` of a store: of Holdfast or stock DCP, a Hugging Face folder, a
    folder of DeepSpeed's ZeRO, a safetensors file or a `.pt` file; or a folder in which another
    program keeps such a checkpoint.

    `check_files`: whether to check that the files of a Holdfast or stock DCP checkpoint are
    complete. `entries`: whether to read the entries in Holdfast's manifest too.

    Raises:
        NotFoundError: there is no such file or folder, or it is no checkpoint.
        UsageError: `name` is a file that is a part of a checkpoint.
        DamagedError, FormatError: the index cannot be read.
    """
    name = checkpoint_in(store, name)
    form = checked_format(store, name)
    if form in ("holdfast", "dcp"):
        read = open_manifest if check_files else read_manifest
        return OpenCheckpoint(form, Source(store, name, read(store, name, entries=entries)))
    if form == "zero":
        joined, notes = open_zero_folder(store, name)
        return OpenCheckpoint(form, Source(store, name, joined), notes=notes)
    if is_folder(store, name):
        folder = open_hf_folder(store, name)
        contents = folder.torch_files
        notes_of_files = [note for part in contents.values() for note in notes_on(part)]
        return OpenCheckpoint(
            form,
            Source(store, name, folder.manifest),
            folder.strides,
            hf=folder,
            values={n: value for part in contents.values() for n, value in part.values.items()},
            notes=(*folder.notes, *notes_of_files),
        )
    return _open_file(store, name, form)


def _open_file(store: ReadStore, name: str, form: Format) -> OpenCheckpoint:
    where = location(store, name)
    folder, _, file = where.rpartition("/")
    fetch, nbytes = fetcher(store, name), store.size(name)
    # A `Source` needs a folder above the file, but this file may be at the root of `store`.
    parent, name_in_parent = open_for_reading(folder)
    if form == "torch":
        content = torchfile.read_file(fetch, nbytes, file=file, where=where)
        source = Source(parent, name_in_parent, content.manifest)
        values, notes = content.values, notes_on(content)
        return OpenCheckpoint(form, source, content.strides, file, values=values, notes=notes)
    manifest = safetensors.read_file(fetch, nbytes, file=file, where=where)
    return OpenCheckpoint(form, Source(parent, name_in_parent, manifest), file=file)


def notes_on(content: TorchFile) -> tuple[str, ...]:
    """Return a note on each object that was left out when the file was read."""
    return tuple(
        f"left out `{name}`: {title}, whose class would have to be imported"
        for name, title in content.left_out.items()
    )


def checked_format(store: ReadStore, name: str) -> Format:
    """Return the format of a checkpoint. Raises a NotFoundError if `name` is not a checkpoint. The
    hint of the error names the newest checkpoint below `name`, if there is one."""
    form = format_of(store, name)
    if form is None:
        raise no_checkpoint(store, name, hint=_hint_to_a_checkpoint(store, name))
    return form


def _hint_to_a_checkpoint(store: ReadStore, name: str) -> str:
    """Return the hint for a `name` that is not a checkpoint. It names the newest checkpoint below
    `name`."""
    if is_folder(store, name):
        if steps := steps_in(store, name):
            return f"its newest step: {location(store, steps[-1])}"
        if others := other_checkpoints(store, name):
            return f"checkpoints in it: {named(others)}; {location(store, name)}/{others[-1]}"
        files = [file for file in store.list(name) if file.endswith(_SUFFIXES)]
        if files := [file for file in files if is_checkpoint(store, f"{name}/{file}")]:
            path = f"{location(store, name)}/{files[0]}"
            return f"give the path of a file in it, such as {path}"
    return "`holdfast list FOLDER` shows the steps of a run's checkpoint folder"


def format_of(store: ReadStore, name: str) -> Format | None:
    """Return the format of a folder or file; None if it is not a checkpoint. Raises a NotFoundError
    if it does not exist, and a UsageError if it is a file that is a part of a checkpoint."""
    parent, _, last = name.rpartition("/")
    names = store.list(parent)
    if last in names:
        check_whole_checkpoint(store, name)
        start = store.read(name, 0, 9)
        if start.startswith(archive.RECORD) or start[:1] == b"\x80":
            return "torch"
        return "safetensors" if name.endswith(safetensors.SUFFIX) or start[8:] == b"{" else None
    if f"{last}/" not in names:
        raise NotFoundError(f"nothing at `{location(store, name)}`")
    return format_among(store.list(name))


def check_exists(store: ReadStore, name: str) -> None:
    """Raise a NotFoundError if there is nothing at `name`. The hint lists what is beside it."""
    parent, _, last = name.rpartition("/")
    where = location(store, name)
    try:
        names = [entry.rstrip("/") for entry in store.list(parent)]
    except NotFoundError as error:
        folder = where.rpartition("/")[0]
        raise NotFoundError(
            f"nothing at `{where}`", hint=f"the folder `{folder}` does not exist either"
        ) from error
    except StorageError:
        return  # The folder above may be one that the user may enter, but not list.
    if last not in names:
        visible = [entry for entry in names if not entry.startswith(".")]
        near = difflib.get_close_matches(last, visible, n=NAMED_MAX) or visible
        raise NotFoundError(
            f"nothing at `{where}`",
            hint=f"beside it: {named(near)}" if near else "the folder above it is empty",
        )


def check_folder(store: ReadStore, name: str) -> None:
    """Raise an error if `name` is a file: the caller needs a folder. The hint names commands that
    accept the file. Does nothing if `name` does not exist."""
    parent, _, last = name.rpartition("/")
    try:
        if last not in store.list(parent):
            return
        form = format_of(store, name)
    except (NotFoundError, StorageError):
        return
    where = location(store, name)
    if form is None:
        raise no_checkpoint(store, name, hint="pass the folder of the checkpoint")
    raise NotFoundError(
        f"`{where}` is a file, {_FILES[form]}; a folder is wanted",
        hint=f"`holdfast convert {where} FOLDER` makes a checkpoint of it; `holdfast show {where}` "
        "lists its contents",
    )


def is_checkpoint(store: ReadStore, name: str) -> bool:
    """Return whether `name` is a checkpoint of any format. False if it cannot be read."""
    try:
        return format_of(store, name) is not None
    except HoldfastError:
        return False


def other_checkpoints(store: ReadStore, name: str) -> list[str]:
    """Return the folders directly below `name` that are checkpoints but are not named after a step:
    renamed copies, exports. Hidden folders are left out."""
    steps = {key.rpartition("/")[2] for key in steps_in(store, name)}
    others = []
    for folder in (entry.rstrip("/") for entry in store.list(name) if entry.endswith("/")):
        if folder in steps or folder.startswith("."):
            continue
        with suppress(HoldfastError):
            # Not `format_of`: for each folder, it would list the folder above again, which may be
            # long.
            names = store.list(f"{name}/{folder}")
            if format_among(names) is not None or SEAL in names:
                others.append(folder)
    return others


def is_folder(store: ReadStore, name: str) -> bool:
    """Return whether `name` is a folder."""
    parent, _, last = name.rpartition("/")
    return f"{last}/" in store.list(parent)
