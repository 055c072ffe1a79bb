"""The checkpoints in one folder: which there are, and the only ways to add one or take one away.

Order of writes (docs/format.md): everything of a checkpoint is durable inside a folder that no
reader looks at before one rename gives it its name; a name is taken away by a rename before the
first of its files goes. So whatever bears a checkpoint's name is whole, at every instant.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from holdfast.catalog.structure import check_structure
from holdfast.errors import DamagedError, HoldfastError, NotFoundError
from holdfast.format import manifest as manifests
from holdfast.format.checksum import checksum, unpack
from holdfast.format.manifest import Manifest
from holdfast.format.names import (
    MANIFEST,
    METADATA,
    Aside,
    aside_of,
    mark_of,
    step_name,
    steps_among,
)
from holdfast.storage.store import ReadStore, Store

_INDEX_BYTES_MAX = 1 << 30


class Catalog:
    """The checkpoints directly below the root of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def steps(self) -> list[int]:
        """Published steps, oldest first. A folder with any other name is not looked at."""
        return list(self.folders())

    def folders(self) -> dict[int, str]:
        """Published steps, oldest first, each with the folder that holds it: see `steps_among`."""
        return steps_among(self.store.list())

    def where(self, name: str) -> str:
        """A checkpoint's place, for people."""
        return place(self.store, name)

    def open(self, name: str) -> Manifest:
        """What a checkpoint holds: see `open_manifest`."""
        return open_manifest(self.store, name)

    def open_step(self, step: int) -> Manifest:
        """As `open`. A step that is not there names those that are."""
        folders = self.folders()
        if step not in folders:
            there = ", ".join(map(str, folders)) or "none"
            raise NotFoundError(
                f"`{self.where(step_name(step))}` does not exist",
                hint=f"steps there: {there}; `load_step = -1` takes the newest good one",
            )
        return self.open(folders[step])

    def begin(self, name: str) -> Aside:
        """A new, empty folder to write checkpoint `name` into."""
        attempt = Aside("attempt", name, os.urandom(4).hex())
        self.store.make_folder(str(attempt))
        return attempt

    def publish(self, attempt: Aside) -> None:
        """Give a whole attempt its name. An earlier checkpoint of that name makes way: it is moved
        aside, where `sweep` removes it, or moves it back should the process die before the new one
        is there."""
        self.store.sync(str(attempt))
        there = self.store.list()
        replacing = f"{attempt.name}/" in there
        if replacing:
            # Were the sweep to find two that had this name, it could not tell which is the newer.
            for stale in map(aside_of, (name.rstrip("/") for name in there)):
                if stale and (stale.role, stale.name) == ("replaced", attempt.name):
                    removing = replace(stale, role="removing")
                    self.store.rename(str(stale), str(removing))
                    self.store.remove(str(removing))
        # What was known of the old one is not known of the new one, not even after a power cut.
        for mark in map(mark_of, there):
            if mark is not None and mark.role == "damaged" and step_name(mark.step) == attempt.name:
                self.store.remove(str(mark))
        # The attempt's own name must be durable before the old checkpoint gives up its name.
        self.store.sync("")
        replaced = str(Aside("replaced", attempt.name, attempt.id))
        if replacing:
            self.store.rename(attempt.name, replaced)
        try:
            self.store.rename(str(attempt), attempt.name)
        except HoldfastError:
            if replacing:
                # If this cannot be done either, readers look there, and the next sweep does it.
                with suppress(HoldfastError):
                    self.store.rename(replaced, attempt.name)
            raise

    def discard(self, attempt: Aside) -> None:
        """Remove an attempt that came to nothing."""
        self.store.remove(str(attempt))

    def let_go(self, name: str) -> Aside:
        """Take a checkpoint's name away, at one instant. What is left looks like nothing whole, and
        is deleted by `execute` of what `plan_removals` or the next sweep finds."""
        aside = Aside("removing", name, os.urandom(4).hex())
        self.store.rename(name, str(aside))
        return aside

    def remove(self, name: str) -> None:
        """Delete a checkpoint: its name first, so that nothing that looks whole is ever in part."""
        self.store.remove(str(self.let_go(name)))


def open_manifest(store: ReadStore, name: str, *, entries: bool = True) -> Manifest:
    """What the checkpoint `name` holds, its structure checked: every file is there in full. Without
    `entries` what is known of it as a whole, if it is Holdfast's own.

    Raises:
        NotFoundError: no such checkpoint, or a folder that holds none.
        DamagedError: it is not as it was published.
        FormatError: its index is not what it claims to be.
    """
    manifest = read_manifest(store, name, entries=entries)
    check_whole(store, name, manifest)
    return manifest


def check_whole(store: ReadStore, name: str, manifest: Manifest) -> None:
    """Make sure that every file of a checkpoint is there in full.

    Raises:
        DamagedError: it is not as it was published.
    """
    problems = check_structure(store, name, manifest)
    if problems:
        raise DamagedError(
            f"`{place(store, name)}` is damaged:\n  " + "\n  ".join(map(str, problems)),
            hint="leave out `load_step` to resume from the newest good step",
        )


def read_manifest(store: ReadStore, name: str, *, entries: bool = True) -> Manifest:
    """As `open_manifest`, without a look at the data files but for the sizes of stock ones."""
    where = place(store, name)
    files = set(store.list(name))
    if MANIFEST in files:
        data = _read_all(store, f"{name}/{MANIFEST}")
        return manifests.decode(data, where=f"{where}/{MANIFEST}", entries=entries)
    if METADATA in files:
        # Not at the top: where all steps are Holdfast's own, no list waits for the reader of stock.
        from holdfast.format.dcp import decode_metadata, is_ours

        data = _read_all(store, f"{name}/{METADATA}")
        manifest = decode_metadata(data, where=f"{where}/{METADATA}")
        if is_ours(data):
            # It would load as a stock checkpoint does, its data unchecked.
            raise DamagedError(
                f"`{where}` was written by Holdfast, and its `{MANIFEST}` is missing",
                hint="leave out `load_step` to resume from the newest good step",
            )
        return replace(manifest, files=_file_sizes(store, name, manifest, files))
    raise NotFoundError(
        f"`{where}` holds no checkpoint: neither `{MANIFEST}` nor `{METADATA}` is there",
        hint=f"found: {', '.join(sorted(files)[:10]) or 'nothing'}",
    )


def read_checksums(store: ReadStore, name: str, manifest: Manifest, file: str) -> tuple[int, ...]:
    """The checksums of all blocks in one data file of checkpoint `name`.

    Raises:
        DamagedError: the table is not the one that was written.
    """
    table = manifest.tables[file]
    packed = store.read(f"{name}/{file}", table.offset, manifest.files[file])
    found = checksum(packed)
    if found != table.checksum or len(packed) != manifest.files[file] - table.offset:
        raise DamagedError(
            f"`{place(store, name)}/{file}`: its table of checksums, from byte {table.offset} on, "
            f"has checksum {found:016x}, the manifest says {table.checksum:016x}",
            hint="leave out `load_step` to resume from the newest good step",
        )
    return unpack(packed)


def steps_in(store: ReadStore, name: str) -> list[str]:
    """The published steps directly below a folder, oldest first, each with the folder's name."""
    return [f"{name}/{folder}" for folder in steps_among(store.list(name)).values()]


def standing(store: ReadStore, name: str) -> str:
    """The folder that holds checkpoint `name`: its own; or, where a save that was to take its place
    has died between its two renames, the one in which the earlier checkpoint stands aside until a
    sweep gives it back its name."""
    above, _, last = name.rpartition("/")
    try:
        there = store.list(above)
    except HoldfastError:
        return name
    if not {last, f"{last}/"} & {*there}:
        for aside in map(aside_of, (one.rstrip("/") for one in there)):
            if aside is not None and (aside.role, aside.name) == ("replaced", last):
                return f"{above}/{aside}" if above else str(aside)
    return name


def place(store: ReadStore, name: str) -> str:
    """A checkpoint's place, for people."""
    return f"{store.url.rstrip('/')}/{name}"


def _read_all(store: ReadStore, key: str) -> bytes:
    return store.read(key, 0, min(store.size(key), _INDEX_BYTES_MAX))


def _file_sizes(
    store: ReadStore, name: str, manifest: Manifest, there: Collection[str]
) -> dict[str, int]:
    """Bytes of the data files of a stock checkpoint, whose index does not say."""
    files = {chunk.file for entry in manifest.tensors.values() for chunk in entry.chunks}
    files |= {entry.file for entry in manifest.values.values()}
    return {file: store.size(f"{name}/{file}") for file in sorted(files) if file in there}
