"""The checkpoints in one folder: which there are, and the only ways to add one or take one away.

Order of writes (docs/format.md): everything of a checkpoint is durable inside a folder that no
reader looks at before one rename gives it its name; a name is taken away by a rename before the
first of its files goes. So whatever bears a checkpoint's name is whole, at every instant.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

from holdfast.catalog.replaceable import why_not_removable, why_not_replaceable
from holdfast.catalog.steady import LOOKS_MAX
from holdfast.catalog.structure import INDEX_BYTES_MAX, check_structure
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
from holdfast.format.manifest import Manifest
from holdfast.format.names import (
    LOCK,
    MANIFEST,
    METADATA,
    Aside,
    aside_of,
    mark_of,
    standing_among,
    step_name,
    step_of,
    steps_among,
)
from holdfast.storage.opening import is_url
from holdfast.storage.store import Check, ReadStore, Store

_LARGE_BYTES = 1 << 20
"""A larger index is looked at before memory is taken for all of it."""

_STARTS = (b"{", b"\x80")
"""First bytes of a manifest, and of a stock index."""


_TRIES = 100


@dataclass(frozen=True, slots=True)
class _Begun:
    """An attempt of this process."""

    held: ExitStack
    """Holds the attempt, and what it is to replace."""

    replaces: bool


class Catalog:
    """The checkpoints directly below the root of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._begun: dict[str, _Begun] = {}
        """Attempts that this catalog has begun, each with what it holds until they are over."""

        self.check_lock: Check = lambda: None
        """Called before anything changes: raises an error where the run has lost its folder."""

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
                hint=f"steps there: {there}",
            )
        return self.open(folders[step])

    def check_free(self, name: str, *, replace: bool, hint: str, file: bool = False) -> None:
        """Make sure that a checkpoint may be saved as `name`; `replace`: in place of one there;
        `file`: it is to be a file, not a folder.

        Raises:
            ExistsError: the name is taken, and not by a checkpoint that may be replaced.
        """
        for left in reversed(range(LOOKS_MAX)):
            there = standing_among(self.store.list(), name)
            if there is None:
                return
            if not replace:
                raise ExistsError(f"`{self.where(name)}` exists already", hint=hint)
            try:
                why = why_not_replaceable(self.store, there, file=file)
                break
            except NotFoundError:
                # Another process is replacing it: look at what has its name then.
                if not left:
                    raise
        if why is None and step_of(name) is not None and self.store.holder(LOCK) is not None:
            why = f"a run saves in `{self.store.url}`"
        if why is not None:
            raise self._kept(name, why)

    def begin(self, name: str, *, replace: bool = False) -> Aside:
        """A new, empty folder to write checkpoint `name` into, held until it is published,
        discarded or released. `replace`: what has the name now may be replaced, and nothing that
        takes it meanwhile.

        Raises:
            ExistsError: it may not be replaced, or another process is replacing or removing it.
        """
        self.check_lock()
        for _ in range(_TRIES):
            attempt = Aside("attempt", name, os.urandom(4).hex())
            self.store.make_folder(str(attempt))
            try:
                if self.hold(attempt, replace=replace) is not False:
                    return attempt
            except NotFoundError:
                # A sweep that took it for a dead one's was here before it could be held.
                continue
        raise StorageError(f"every attempt to save `{self.where(name)}` was removed at once")

    def hold(self, attempt: Aside, *, replace: bool) -> bool | None:
        """Hold an attempt that is there: see `Store.hold` for what this gives, and `begin`."""
        with ExitStack() as stack:
            mine = stack.enter_context(self.store.hold(str(attempt)))
            if mine is False:
                return mine
            there = self.store.list() if replace else ()
            replaced = standing_among(there, attempt.name)
            if replaced is not None:
                self._hold_replaced(attempt, replaced, stack)
            self._begun[str(attempt)] = _Begun(stack.pop_all(), replaced is not None)
        return mine

    def _hold_replaced(self, attempt: Aside, replaced: str, stack: ExitStack) -> None:
        """Hold what an attempt is to replace. The attempt goes where that cannot be done."""
        try:
            if stack.enter_context(self.store.hold(replaced)) is False:
                raise self._kept(attempt.name, "another process is replacing or removing it")
            if replaced != attempt.name:
                # Left aside by a save that died: sweeps give it its name back, and so does this.
                self.store.rename(replaced, attempt.name)
            if why := why_not_removable(self.store, attempt.name):
                raise self._kept(attempt.name, why)
        except HoldfastError:
            with suppress(HoldfastError):
                self.store.remove(str(attempt))
            raise

    def publish(self, attempt: Aside) -> None:
        """Give a whole attempt its name. The checkpoint that it replaces makes way: it is moved
        aside, where a sweep removes it, or moves it back should the process die before the new one
        is there.

        Raises:
            ExistsError: something else has taken the name meanwhile.
        """
        self.check_lock()
        self.store.sync(str(attempt))
        there = self.store.list()
        begun = self._begun.get(str(attempt))
        found = standing_among(there, attempt.name)
        if begun is not None and begun.replaces and found == attempt.name:
            self._publish_in_place(attempt, there)
        elif found not in (None, attempt.name):
            raise self._kept(attempt.name, "another process is replacing it")
        else:
            self._forget_damage(attempt.name, there)
            # The attempt's own name must be durable before it gets another.
            self.store.sync("")
            self.store.rename(str(attempt), attempt.name)
        self.release(attempt)

    def _publish_in_place(self, attempt: Aside, there: Collection[str]) -> None:
        # Were a sweep to find two that had this name, it could not tell which is the newer.
        for stale in map(aside_of, (name.rstrip("/") for name in there)):
            if stale and (stale.role, stale.name) == ("replaced", attempt.name):
                # A sweep that is at it already has done so.
                with suppress(NotFoundError):
                    self._delete_aside(stale)
        self._forget_damage(attempt.name, there)
        # The attempt's own name must be durable before the old checkpoint gives up its name.
        self.store.sync("")
        replaced = Aside("replaced", attempt.name, attempt.id)
        try:
            why = why_not_removable(self.store, attempt.name)
        except NotFoundError:
            why = "it has just been removed"
        if why is not None:
            raise self._kept(attempt.name, why)
        try:
            self.store.rename(attempt.name, str(replaced))
            self.store.rename(str(attempt), attempt.name)
        except ExistsError as error:
            # Another save was faster: what both were to replace is not needed any more.
            with suppress(HoldfastError):
                self._delete_aside(replaced)
            raise self._kept(attempt.name, "another save has just taken its place") from error
        except HoldfastError:
            # If this cannot be done either, readers look there, and the next clean-up does it.
            with suppress(HoldfastError):
                self.store.rename(str(replaced), attempt.name)
            raise
        # While it is held: a sweep must not give the name back once the next save needs it.
        with suppress(HoldfastError):
            self.store.rename(str(replaced), str(replace(replaced, role="removing")))

    def _delete_aside(self, replaced: Aside) -> None:
        """Delete a checkpoint that stands aside: from its first file on a clean-up must not give it
        back its name."""
        removing = replace(replaced, role="removing")
        self.store.rename(str(replaced), str(removing))
        self.store.remove(str(removing))

    def _forget_damage(self, name: str, there: Collection[str]) -> None:
        """Remove the mark of the old checkpoint, which is not known of the new one, not even after
        a power cut."""
        for mark in map(mark_of, there):
            if mark is not None and mark.role == "damaged" and step_name(mark.step) == name:
                with suppress(NotFoundError):
                    self.store.remove(str(mark))

    def release(self, attempt: Aside) -> None:
        """Hold an attempt no longer. The next save or start may sweep it."""
        begun = self._begun.pop(str(attempt), None)
        if begun is not None:
            begun.held.close()

    def release_all(self) -> None:
        """Hold no attempt any longer, of whatever save was interrupted."""
        for begun in [*self._begun.values()]:
            begun.held.close()
        self._begun.clear()

    def discard(self, attempt: Aside) -> None:
        """Remove an attempt that came to nothing."""
        try:
            self.store.remove(str(attempt))
        finally:
            self.release(attempt)

    def let_go(self, name: str) -> Aside:
        """Take a checkpoint's name away, at one instant. What is left looks like nothing whole, and
        is deleted by `execute` of what `plan_removals` or the next sweep finds.

        Raises:
            ExistsError: another process is replacing or removing it, or it is not one checkpoint.
        """
        self.check_lock()
        aside = Aside("removing", name, os.urandom(4).hex())
        with self.store.hold(name) as held:
            if held is False:
                raise self._kept(name, "another process is replacing or removing it", "removed")
            if why := why_not_removable(self.store, name):
                raise self._kept(name, why, "removed")
            self.store.rename(name, str(aside))
        return aside

    def remove(self, name: str) -> None:
        """Delete a checkpoint: its name first, so that nothing that looks whole is ever in part."""
        self.store.remove(str(self.let_go(name)))

    def _kept(self, name: str, why: str, what: str = "replaced") -> ExistsError:
        return ExistsError(
            f"`{self.where(name)}` is not {what}: {why}",
            hint=f"only one checkpoint, or one export, that nobody else uses is {what}; choose "
            "another path, or move it away",
        )


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
            hint=verify_hint(place(store, name)),
        )


def read_manifest(store: ReadStore, name: str, *, entries: bool = True) -> Manifest:
    """As `open_manifest`, without a look at the data files but for the sizes of stock ones."""
    where = place(store, name)
    files = set(store.list(name))
    for index in {MANIFEST, METADATA} & files:
        if store.leads_out(name, index):
            raise FormatError(f"`{where}/{index}` is a link to a place outside of its folder")
    if MANIFEST in files:
        data = read_index(store, f"{name}/{MANIFEST}")
        return manifests.decode(data, where=f"{where}/{MANIFEST}", entries=entries)
    if METADATA in files:
        # Not at the top: where all steps are Holdfast's own, no list waits for the reader of stock.
        from holdfast.format.dcp import decode_metadata, is_ours

        data = read_index(store, f"{name}/{METADATA}")
        manifest = decode_metadata(data, where=f"{where}/{METADATA}")
        if is_ours(data):
            # It would load as a stock checkpoint does, its data unchecked.
            raise DamagedError(
                f"`{where}` was written by Holdfast, and its `{MANIFEST}` is missing",
                hint=verify_hint(where),
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
            hint=verify_hint(place(store, name)),
        )
    return unpack(packed)


def verify_hint(where: str) -> str:
    """Next step where the checkpoint at `where` is damaged."""
    return f"`holdfast verify {where}` lists what is damaged"


def steps_in(store: ReadStore, name: str) -> list[str]:
    """The published steps directly below a folder, oldest first, each with the folder's name."""
    return [f"{name}/{folder}" for folder in steps_among(store.list(name)).values()]


def standing(store: ReadStore, name: str) -> str:
    """The folder that holds checkpoint `name`: its own; or, where a save that was to take its place
    has died between its two renames, the one in which the earlier checkpoint stands aside until a
    sweep gives it back its name. Behind a URL nobody saves, and listing may be slow or refused."""
    if is_url(store.url):
        return name
    above, _, last = name.rpartition("/")
    try:
        found = standing_among(store.list(above), last)
    except HoldfastError:
        return name
    return name if found is None or found == last else f"{above}/{found}".lstrip("/")


def place(store: ReadStore, name: str) -> str:
    """A checkpoint's place, for people."""
    return f"{store.url.rstrip('/')}/{name}"


def read_index(store: ReadStore, key: str) -> bytes:
    """All bytes of an index.

    Raises:
        FormatError: so many that it can be none: a sparse file may state any size.
    """
    nbytes = store.size(key)
    if nbytes > INDEX_BYTES_MAX:
        raise FormatError(
            f"`{place(store, key)}` has {nbytes} bytes, an index has at most {INDEX_BYTES_MAX}"
        )
    if nbytes > _LARGE_BYTES and store.read(key, 0, 1) not in _STARTS:
        raise DamagedError(f"`{place(store, key)}` has {nbytes} bytes, and is no index")
    return store.read(key, 0, nbytes)


def _file_sizes(
    store: ReadStore, name: str, manifest: Manifest, there: Collection[str]
) -> dict[str, int]:
    """Bytes of the data files of a stock checkpoint, whose index does not say."""
    files = {chunk.file for entry in manifest.tensors.values() for chunk in entry.chunks}
    files |= {entry.file for entry in manifest.values.values()}
    return {file: store.size(f"{name}/{file}") for file in sorted(files) if file in there}
