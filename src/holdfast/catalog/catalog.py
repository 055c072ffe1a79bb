"""The checkpoints in one folder, and all operations that add, replace or delete one.

Order of writes (docs/format.md): a save writes the checkpoint into a folder that readers ignore,
makes it durable and then renames the folder to the checkpoint's name. A deletion first renames the
folder to a name that readers ignore. So a folder with the name of a checkpoint is always complete.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress

from holdfast.catalog.cleanup import delete_hidden, execute, plan_cleanup
from holdfast.catalog.findings import raise_unreadable
from holdfast.catalog.replaceable import is_checkpoint_with_others, why_not_replaceable
from holdfast.catalog.steady import LOOKS_MAX, is_deleted
from holdfast.catalog.structure import INDEX_BYTES_MAX, check_structure, items_of
from holdfast.errors import (
    DamagedError,
    ExistsError,
    FormatError,
    HoldfastError,
    NotFoundError,
    StorageError,
)
from holdfast.format import manifest as manifests
from holdfast.format.checksum import checksum, unpack
from holdfast.format.chunks import BLOCK_BYTES
from holdfast.format.manifest import Manifest
from holdfast.format.names import (
    INDEX_FILES,
    LOCK,
    MANIFEST,
    METADATA,
    ROWS,
    HiddenFolder,
    folder_among,
    hidden_folder_of,
    mark_of,
    number_of,
    step_name,
    step_of,
    steps_among,
)
from holdfast.format.pointer import id_in
from holdfast.format.seal import SEAL
from holdfast.storage.listed import ListedStore
from holdfast.storage.opening import is_url
from holdfast.storage.store import Check, ReadStore, Store

logger: logging.Logger = logging.getLogger("holdfast")

_LARGE_BYTES = 1 << 20
"""Size above which the first byte of an index is checked before the whole index is read."""

_REMOTE_ROWS_BYTES = 4 << 20
"""Bytes of `index.bin` that one request to a URL reads. Thousands of small requests would take
longer than fetching the whole file."""

_STARTS = (b"{", b"\x80")
"""First byte of a manifest, and first byte of a stock index."""

_TRIES = 100
"""Most attempts that `begin` creates for one save, if cleanups delete one after the other."""


WhyKept = Callable[[ReadStore, str], str | None]


class Catalog:
    """The checkpoints directly below the root of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._begun: dict[str, tuple[ExitStack, bool]] = {}
        """For each unfinished attempt, by the name of its folder: the context that ends its holds
        on folders when it is closed, and whether the attempt replaces a checkpoint."""

        self.why_kept: WhyKept = why_not_replaceable
        """Function that returns the reason why this catalog may neither replace nor delete a
        folder; None if it may."""

        self.renames_kept: bool = False
        """Whether a save renames a checkpoint with files of the user in it, and takes its name. If
        not, the save is refused."""

        self.check_lock: Check = lambda: None
        """Function that is called before every change of the folder. It raises an error if the run
        has lost its lock on the folder."""

    def steps(self) -> list[int]:
        """Return the step numbers of the published checkpoints, oldest first. Checkpoints that are
        not named after a step are ignored."""
        return list(self.folders())

    def folders(self) -> dict[int, str]:
        """Return the name of the folder of each published checkpoint, by step, oldest first. It is
        `step-N`, or a hidden name if a save was killed while it replaced the checkpoint."""
        return steps_among(self.store.list())

    def where(self, name: str) -> str:
        """Return the path or URL of a checkpoint, for messages."""
        return location(self.store, name)

    def check_free(
        self,
        name: str,
        *,
        replace: bool,
        hint: str,
        why_not: WhyKept = why_not_replaceable,
    ) -> None:
        """Check that a checkpoint may be saved as `name`. Raises an ExistsError if not.

        `replace`: whether an existing checkpoint may be replaced. `why_not`: function that returns
        a reason against replacing it, or None.
        """
        for left in reversed(range(LOOKS_MAX)):
            folder = folder_among(self.store.list(), name)
            if folder is None:
                return
            if not replace:
                raise ExistsError(f"`{self.where(name)}` exists already", hint=hint)
            try:
                why = why_not(self.store, folder)
                break
            except NotFoundError:
                # Another process has renamed or deleted the folder since it was listed: list again.
                if not left:
                    raise
        if why is None and step_of(name) is not None and self.store.holder(LOCK) is not None:
            why = f"a run saves in `{self.store.url}`"
        if why is not None:
            raise self._kept(name, why)

    def begin(self, name: str, *, replace: bool = False, chosen_id: str = "") -> HiddenFolder:
        """Create an empty folder to write checkpoint `name` into.

        The folder is held until it is published, aborted or released. `replace`: whether the
        checkpoint that has the name now may be replaced. A checkpoint that takes the name later is
        never replaced. `chosen_id`: eight hexadecimal digits for the folder's name, not used
        before; random by default.

        Raises:
            ExistsError: the checkpoint may not be replaced, or another process is replacing or
                deleting it.
        """
        self.check_lock()
        for _ in range(_TRIES):
            attempt = HiddenFolder("attempt", name, chosen_id or os.urandom(4).hex())
            self.store.make_folder(str(attempt))
            try:
                if self.hold(attempt, replace=replace) is not False:
                    return attempt
            except NotFoundError:
                # A cleanup deleted the folder before it was held.
                continue
        raise StorageError(f"every attempt to save `{self.where(name)}` was deleted at once")

    def hold(self, attempt: HiddenFolder, *, replace: bool) -> bool | None:
        """Hold an existing attempt. Returns True on success, False if another process holds it, and
        None if the store cannot tell. `replace`: whether the checkpoint that has the name now may
        be replaced."""
        with ExitStack() as stack:
            held = stack.enter_context(self.store.hold(str(attempt)))
            if held is False:
                return held
            names = self.store.list() if replace else ()
            replaced = folder_among(names, attempt.name)
            if replaced is not None:
                self._hold_replaced(attempt, replaced, stack)
            self._begun[str(attempt)] = (stack.pop_all(), replaced is not None)
        return held

    def _hold_replaced(self, attempt: HiddenFolder, replaced: str, stack: ExitStack) -> None:
        """Hold the checkpoint that an attempt will replace. Deletes the attempt on failure.
        `replaced`: folder of the checkpoint. `stack`: gets the hold, and ends it when closed."""
        try:
            if stack.enter_context(self.store.hold(replaced)) is False:
                raise self._kept(attempt.name, "another process is replacing or deleting it")
            if replaced != attempt.name:
                # A killed save has renamed the checkpoint: give it its name back, as a cleanup
                # would.
                self.store.publish(replaced, attempt.name)
            why = self.why_kept(self.store, attempt.name)
            if why and not self._may_rename(attempt.name):
                raise self._kept(attempt.name, why)
        except HoldfastError:
            with suppress(HoldfastError):
                self.store.remove(str(attempt))
            raise

    def publish(self, attempt: HiddenFolder) -> None:
        """Give a complete attempt the name of its checkpoint.

        Raises:
            ExistsError: another checkpoint has taken the name meanwhile.
        """
        self.check_lock()
        self.store.sync(str(attempt))
        names = self.store.list()
        _, replaces = self._begun.get(str(attempt), (None, False))
        existing = folder_among(names, attempt.name)
        if replaces and existing == attempt.name:
            self._publish_in_place(attempt, names)
        elif existing not in (None, attempt.name):
            raise self._kept(attempt.name, "another process is replacing it")
        else:
            self._delete_damage_mark(attempt.name, names)
            # The attempt's present name must be durable before the rename to its final name.
            self.store.sync("")
            self.store.publish(str(attempt), attempt.name)
        self.release(attempt)

    def _publish_in_place(self, attempt: HiddenFolder, names: Collection[str]) -> None:
        # Delete older `.replaced` folders of this checkpoint. The rename below may leave a new one,
        # and a cleanup could not tell which of two is newer.
        for stale in map(hidden_folder_of, (name.rstrip("/") for name in names)):
            if stale and (stale.role, stale.name) == ("replaced", attempt.name):
                # A cleanup may have renamed this folder already.
                with suppress(NotFoundError):
                    delete_hidden(self.store, stale)
        self._delete_damage_mark(attempt.name, names)
        # The attempt's present name must be durable before the old checkpoint loses its name.
        self.store.sync("")
        try:
            why = self.why_kept(self.store, attempt.name)
        except NotFoundError:
            why = "it has just been deleted"
        if why is not None:
            if not self._may_rename(attempt.name):
                raise self._kept(attempt.name, why)
            self._rename_kept(attempt, why)
        try:
            self.store.publish(str(attempt), attempt.name, replace=why is None)
        except ExistsError as error:
            raise self._kept(attempt.name, "another save has just taken its place") from error

    def _may_rename(self, name: str) -> bool:
        """Return whether a save may rename `name`: a checkpoint with files of the user."""
        return self.renames_kept and is_checkpoint_with_others(self.store, name)

    def _rename_kept(self, attempt: HiddenFolder, why: str) -> None:
        """Give a checkpoint with files of the user another name, so that neither they nor the run
        is lost: the attempt takes the present name."""
        aside = f"{attempt.name}.kept-{attempt.id}"
        self.store.publish(attempt.name, aside)
        logger.warning(
            "`%s` was renamed to `%s`, since %s; a new checkpoint takes its place. Move the files, "
            "and delete the folder",
            self.where(attempt.name),
            aside,
            why,
        )

    def _delete_damage_mark(self, name: str, names: Collection[str]) -> None:
        """Delete the mark `damaged` of the old checkpoint `name`. Call this before the new
        checkpoint of this name is published: otherwise the new one could have the mark after a
        power cut. `names`: all files and folders of the catalog."""
        for mark in map(mark_of, names):
            if mark is not None and mark.role == "damaged" and step_name(mark.step) == name:
                with suppress(NotFoundError):
                    self.store.remove(str(mark))

    def release(self, attempt: HiddenFolder) -> None:
        """Stop holding an attempt. The next save or start may then clean it up."""
        if str(attempt) in self._begun:
            held, _ = self._begun.pop(str(attempt))
            held.close()

    def release_all(self) -> None:
        """Stop holding all attempts, after saves were interrupted."""
        while self._begun:
            _, (held, _) = self._begun.popitem()
            held.close()

    def abort(self, attempt: HiddenFolder) -> None:
        """Delete an unpublished attempt. A failure of the deletion raises no error: the next start
        cleans up."""
        try:
            with suppress(HoldfastError):
                self.store.remove(str(attempt))
        finally:
            self.release(attempt)

    def clean_up(self, name: str) -> None:
        """Delete the leftovers of earlier saves of checkpoint `name`. Failures are only logged."""
        for problem in execute(self.store, plan_cleanup(self.store.list(), only=name)):
            logger.warning("%s; the next save tries again", problem)

    def set_aside_for_deletion(self, name: str) -> str:
        """Rename a checkpoint so that readers no longer find it. Returns the new name of its
        folder, which the next cleanup deletes. Raises an ExistsError if another process uses the
        checkpoint, or if `why_kept` gives a reason."""
        self.check_lock()
        removing = HiddenFolder("removing", name, os.urandom(4).hex())
        with self.store.hold(name) as held:
            if held is False:
                raise self._kept(name, "another process is replacing or deleting it", "deleted")
            if why := self.why_kept(self.store, name):
                raise self._kept(name, why, "deleted")
            return self.store.unpublish(name, str(removing))

    def _kept(self, name: str, why: str, verb: str = "replaced") -> ExistsError:
        return ExistsError(
            f"`{self.where(name)}` is not {verb}: {why}",
            hint=f"only one checkpoint, or one export, that no other process uses is {verb}; "
            "move it or the other files in it away, or choose another path",
        )


def open_manifest(store: ReadStore, name: str, *, entries: bool = True) -> Manifest:
    """Read the manifest of checkpoint `name`, and check that all files of the checkpoint are
    complete.

    `entries`: whether to read the entries, the descriptions of tensors and values. The index of
    stock DCP is always read in full.

    Raises:
        NotFoundError: there is no such checkpoint.
        DamagedError: an index has changed, or a file is missing or has another size.
        FormatError: the index is malformed.
        StorageError: a file cannot be read now.
    """
    manifest = read_manifest(store, name, entries=entries)
    check_whole(store, name, manifest)
    return manifest


def check_whole(store: ReadStore, name: str, manifest: Manifest) -> None:
    """Check the files of a checkpoint, their sizes and its indices, without reading data. Raises a
    DamagedError if a file is missing or has another size, or an index has changed. Raises a
    StorageError if a file cannot be read: then no other finding is certain."""
    problems = check_structure(store, name, manifest)
    raise_unreadable(location(store, name), problems)
    if problems:
        raise DamagedError(
            f"`{location(store, name)}` is damaged:\n  " + "\n  ".join(map(str, problems)),
            hint=verify_hint(location(store, name)),
        )


def read_manifest(store: ReadStore, name: str, *, entries: bool = True) -> Manifest:
    """Read the manifest of a checkpoint without checking its files: see `open_manifest`."""
    where = location(store, name)
    files = set(store.list(name))
    for index in files.intersection(INDEX_FILES):
        check_inside(store, name, index)
    if MANIFEST in files:
        data = read_index(store, f"{name}/{MANIFEST}")
        if (folder := id_in(data)) is not None:
            raise FormatError(
                f"`{where}` is a copy of a checkpoint of an object store, with its files in "
                f"`{folder}`",
                hint=f"open `{where}/{folder}`",
            )
        last = store.last if isinstance(store, ListedStore) else None
        manifest = manifests.decode(data, where=f"{where}/{MANIFEST}", entries=entries, last=last)
        connect_rows(store, name, manifest)
        return manifest
    if METADATA in files:
        # Imported here, since a listing of Holdfast's own checkpoints does not need the module.
        from holdfast.format.dcp import decode_metadata, is_ours

        data = read_index(store, f"{name}/{METADATA}")
        manifest = decode_metadata(data, where=f"{where}/{METADATA}")
        if is_ours(data):
            # Do not load it as a stock checkpoint: its data would not be checked.
            raise DamagedError(
                f"`{where}` was written by Holdfast, and its `{MANIFEST}` is missing",
                hint=verify_hint(where),
            )
        return dataclasses.replace(manifest, files=_file_sizes(store, name, manifest, files))
    raise NotFoundError(
        f"`{where}` holds no checkpoint: neither `{MANIFEST}` nor `{METADATA}` is there",
        hint=f"found: {', '.join(sorted(files)[:10]) or 'nothing'}",
    )


def connect_rows(store: ReadStore, name: str, manifest: Manifest) -> None:
    """Let a manifest read the rows of its chunks from `index.bin`. Do nothing if the checkpoint has
    no `index.bin`."""
    if manifest.rows is None:
        return
    key = f"{name}/{ROWS}"
    where = location(store, key)

    def fetch(start: int, stop: int) -> bytes:
        try:
            return store.read(key, start, stop)
        except NotFoundError as error:
            raise missing_file_error(store, name, ROWS) from error

    unit_bytes = _REMOTE_ROWS_BYTES if is_url(store.url) else BLOCK_BYTES
    manifest.rows.connect(fetch, where, unit_bytes)


def check_inside(store: ReadStore, name: str, file: str) -> None:
    """Raise a FormatError if a file is a link to a place outside of its folder.

    A folder from a stranger could otherwise make its reader open private files. Links inside the
    cache of the Hugging Face hub are allowed.
    """
    if store.leads_out(name, file):
        raise FormatError(
            f"`{location(store, name)}/{file}` is a link to a place outside of its folder",
            hint="if the link is yours, replace it by a copy of the file: cp -L",
        )


def read_checksums(store: ReadStore, name: str, manifest: Manifest, file: str) -> tuple[int, ...]:
    """Read the block checksums of a data file from the table at its end. Raises a DamagedError if
    the table does not match its own checksum."""
    table, where = manifest.tables[file], location(store, name)
    packed = store.read(f"{name}/{file}", table.offset, manifest.files[file])
    found = checksum(packed)
    if found != table.checksum or len(packed) != manifest.files[file] - table.offset:
        raise DamagedError(
            f"`{where}/{file}`: its table of checksums, from byte {table.offset} on, "
            f"has checksum {found:016x}, the manifest says {table.checksum:016x}",
            hint=verify_hint(where),
        )
    return unpack(packed)


def missing_file_error(store: ReadStore, name: str, file: str) -> HoldfastError:
    """Return the error for a missing file: NotFoundError if the whole checkpoint was deleted, else
    DamagedError."""
    checkpoint = location(store, name)
    if is_deleted(store, name):
        return NotFoundError(f"`{checkpoint}` was deleted meanwhile")
    where = f"{checkpoint}/{file}"
    return DamagedError(f"`{where}` is missing", hint=verify_hint(checkpoint), file=where)


def verify_hint(where: str) -> str:
    """Return the hint for an error about a damaged checkpoint at `where`."""
    return f"`holdfast verify {where}` lists what is damaged"


def steps_in(store: ReadStore, name: str) -> list[str]:
    """Return the paths of the published checkpoints that are named after a step and are directly
    below folder `name`, oldest first. If there are none, return the paths of the sealed folders
    directly below it."""
    names = store.list(name)
    folders = list(steps_among(names).values()) or sealed_among(store, name, names)
    return [f"{name}/{folder}" for folder in folders]


def sealed_among(store: ReadStore, name: str, names: Iterable[str]) -> list[str]:
    """Return the sealed folders among `names`, the files and folders in folder `name`. They are
    sorted by the last number in their names."""
    sealed = []
    for folder in (entry.rstrip("/") for entry in names if entry.endswith("/")):
        with suppress(HoldfastError):
            files = store.list(f"{name}/{folder}".lstrip("/"))
            if SEAL in files and hidden_folder_of(folder) is None:
                sealed.append(folder)
    return sorted(sealed, key=lambda folder: (number_of(folder) or -1, folder))


def location(store: ReadStore, name: str) -> str:
    """Return the path or URL of a checkpoint, for messages."""
    return f"{store.url.rstrip('/')}/{name}"


def read_index(store: ReadStore, key: str) -> bytes:
    """Read all bytes of an index."""
    # A sparse file can claim any size: check the size and the first byte before reading all.
    nbytes = store.size(key)
    if nbytes > INDEX_BYTES_MAX:
        raise FormatError(
            f"`{location(store, key)}` has {nbytes} bytes, an index has at most {INDEX_BYTES_MAX}"
        )
    if nbytes > _LARGE_BYTES and store.read(key, 0, 1) not in _STARTS:
        raise DamagedError(f"`{location(store, key)}` has {nbytes} bytes, and is no index")
    return store.read(key, 0, nbytes)


def _file_sizes(
    store: ReadStore, name: str, manifest: Manifest, existing: Collection[str]
) -> dict[str, int]:
    """Return the size of each existing data file of a stock checkpoint, whose index has no
    sizes."""
    files = {file for _, file, _ in items_of(manifest)}
    return {file: store.size(f"{name}/{file}") for file in sorted(files) if file in existing}
