"""Reuse files of an earlier checkpoint if their tensors have not changed.

A checkpoint in a folder gets hard links to these files. An object store copies the files itself: it
stores them again, but the host does not send them again. In this module, "link" means either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from holdfast.catalog.catalog import Catalog, read_checksums, read_manifest
from holdfast.catalog.contents import RecordReader, check_files, run
from holdfast.catalog.marks import marks_in
from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.format import checksum
from holdfast.format.manifest import Manifest
from holdfast.format.names import HiddenFolder, step_of
from holdfast.planning.file_layout import (
    FileLayout,
    TensorItem,
    containers_of,
    lay_out,
    lay_out_file,
)
from holdfast.planning.shared_files import (
    ItemKey,
    RankFiles,
    StoredFile,
    StoredItem,
    files_of_rank,
    free_numbers,
    key_of,
    linkable,
    number_of,
    stored_items,
)
from holdfast.saving.write import WINDOW_BYTES, Pace, WindowsOf, WriteResult, write
from holdfast.storage.store import Copying, Linking
from holdfast.timing import Spans

logger: logging.Logger = logging.getLogger("holdfast")

_REMEMBERED = 3
"""Number of checkpoints whose files are remembered: the two that a save compares with, and one
more, since the save may replace one of them."""


class Deduplicator:
    """Saves the unchanged tensors of one rank by linking the files of an earlier checkpoint.

    The earlier checkpoint is the one before the previous one. Two consecutive checkpoints therefore
    share no file, so a damaged file never damages both of them.
    """

    def __init__(self, catalog: Catalog, rank: int, *, check_every: int) -> None:
        """`check_every`: number of times that a file is linked before it is read and compared with
        its checksums; 0 for never.

        Raises:
            UsageError: the store can neither link files nor copy them.
        """
        store = catalog.store
        self._linking = store if isinstance(store, Linking) else None
        if isinstance(store, Linking):
            self._share: Callable[[str, str], None] = store.link
        elif isinstance(store, Copying):
            self._share = store.copy
        else:
            raise _no_links(store.url, "it is no folder of a file system, and no object store")
        self._catalog, self._store = catalog, store
        self._rank, self._check_every = rank, check_every
        self._saved: list[RankFiles] = []
        self._written: RankFiles | None = None

    def check_links(self) -> None:
        """Check, by trying, that the store can link or copy a file. Only the holder of the folder's
        lock may call this.

        Raises:
            UsageError: the store can do neither.
        """
        # If the process dies here, a later cleanup deletes the folder.
        folder = str(HiddenFolder("attempt", "links", "0" * 8))
        self._store.make_folder(folder)
        try:
            with self._store.create(f"{folder}/file", 0):
                pass
            self._share(f"{folder}/file", f"{folder}/link")
        except HoldfastError as error:
            raise _no_links(self._store.url, error.what) from error
        finally:
            self._store.remove(folder)

    def resumed(self, earlier: Iterable[tuple[str, Manifest]]) -> None:
        """Let the next saves link files of the checkpoint that the run has resumed from, and of
        older ones. `earlier`: names and manifests of these checkpoints, the oldest first."""
        self._saved = [
            files_of_rank(self._rank, name, manifest)
            for name, manifest in earlier
            # Leave out checkpoints with `index.bin`: every rank would read the rows of all ranks to
            # find its own.
            if manifest.block_bytes == checksum.BLOCK_BYTES and manifest.rows is None
        ]

    def can_link(self, name: str) -> bool:
        """Whether the save of checkpoint `name` may find files to link."""
        return self._earlier(name)[0] is not None

    def _earlier(self, name: str) -> tuple[RankFiles | None, RankFiles | None]:
        """Return the files of two checkpoints: of the one whose files the save of `name` may link,
        and of the newest; None for one that is missing. The checkpoint that this save replaces is
        neither of them."""
        others = [one for one in self._saved if one.checkpoint != name]
        return (others[-2] if len(others) > 1 else None), (others[-1] if others else None)

    def write(
        self,
        attempt: HiddenFolder,
        layout: FileLayout,
        windows_of: WindowsOf,
        *,
        check_space: Callable[[int], None],
        pace: Pace,
        spans: Spans,
    ) -> WriteResult:
        """Link files of an earlier checkpoint into the attempt, and write the rest.

        `layout`: layout of a single file with all tensors and values. `check_space`: function that
        raises a StorageError if the given number of bytes is not free.
        """
        base = {key_of(item): item for item in layout.tensors}
        with spans("write"):
            earlier, newest = self._earlier(attempt.name)
            unchanged, recent = self._compare(layout.tensors, windows_of, earlier, newest)
            linked, items = self._link_all(
                attempt, layout.tensors, earlier, unchanged, taken=self._identities(newest)
            )
        rest = {key: item for key, item in base.items() if key not in items}
        # Tensors that did not change recently get a separate file, which later saves can link.
        is_quiet = unchanged | recent
        quiet = [item for key, item in rest.items() if key in is_quiet]
        changed = [item for key, item in rest.items() if key not in is_quiet]
        # An object store may finish a failed copy late. The copy must not replace a file that is
        # written here, so do not use the number of any file of `earlier`.
        avoided = {} if earlier is None or self._linking is not None else earlier.files
        first, second = free_numbers([*linked, *avoided])
        layouts = (
            self._lay_out(quiet, first),
            self._lay_out(changed, second if quiet else first, values=containers_of(layout)),
        )
        check_space(sum(one.nbytes for one in layouts))
        for one in layouts:
            items |= stored_items(one)
        results = [
            write(
                self._store,
                str(attempt),
                one,
                lambda item: windows_of(base[key_of(item)]),
                pace,
                spans,
            )
            for one in layouts
        ]
        written = {r.file: StoredFile(r.file, r.nbytes, r.table) for r in results if r.file}
        self._written = RankFiles(attempt.name, linked | written, items)
        others = [file for name, file in (linked | written).items() if name != results[1].file]
        places = _places([items[key] for key in base])
        return replace(results[1], others=tuple(others), places=places)

    def _lay_out(
        self,
        items: Iterable[TensorItem],
        number: int,
        values: Iterable[tuple[Collection[str], bytes]] = (),
    ) -> FileLayout:
        placed = lay_out([(item.name, item.dtype, item.region) for item in items])
        return lay_out_file(self._rank, placed, values, number)

    def published(self, name: str) -> None:
        """Remember the files that the last `write` has linked or written, as those of checkpoint
        `name`."""
        assert self._written is not None, "`write` comes first"
        others = [one for one in self._saved if one.checkpoint != name]
        self._saved = [*others, self._written][-_REMEMBERED:]
        self._written = None

    def _compare(
        self,
        items: Iterable[TensorItem],
        windows_of: WindowsOf,
        earlier: RankFiles | None,
        newest: RankFiles | None,
    ) -> tuple[set[ItemKey], set[ItemKey]]:
        """Return two sets of keys: of the items whose bytes are the same in `earlier`, and of those
        whose bytes are the same in `newest`."""
        saved = [one for one in (earlier, newest) if one is not None]
        damaged = {m.step for m in marks_in(self._store) if m.role == "damaged"} if saved else set()
        known = [
            {} if one is None or step_of(one.checkpoint) in damaged else self._checksums_of(one)
            for one in (earlier, newest)
        ]
        equal: tuple[set[ItemKey], set[ItemKey]] = (set(), set())
        for item in items:
            key = key_of(item)
            stored = [checksums[key] for checksums in known if key in checksums]
            if not stored:
                continue
            matching = _matching(windows_of(item), stored)
            for checksums, keys in zip(known, equal, strict=True):
                if checksums.get(key) in matching:
                    keys.add(key)
        return equal

    def _checksums_of(self, saved: RankFiles) -> dict[ItemKey, tuple[int, ...]]:
        """Read the checksums of the blocks of each item in a checkpoint. Leave out the items of a
        file that has changed since it was written."""
        tables = {
            name: self._table(f"{saved.checkpoint}/{name}", file)
            for name, file in saved.files.items()
        }
        return {
            key: table[item.first_block :][: item.num_blocks]
            for key, item in saved.items.items()
            if (table := tables[item.file]) is not None
        }

    def _table(self, key: str, file: StoredFile) -> tuple[int, ...] | None:
        """Read the checksums of a file's blocks. Return None if the file has changed."""
        try:
            if self._store.size(key) != file.nbytes:
                return None
            packed = self._store.read(key, file.table.offset, file.nbytes)
        except HoldfastError:
            return None
        if checksum.checksum(packed) != file.table.checksum:
            return None
        return checksum.unpack(packed)

    def _link_all(
        self,
        attempt: HiddenFolder,
        items: Sequence[TensorItem],
        earlier: RankFiles | None,
        unchanged: Collection[ItemKey],
        *,
        taken: Collection[str],
    ) -> tuple[dict[str, StoredFile], dict[ItemKey, StoredItem]]:
        """Link the files of `earlier` that hold enough unchanged items. Returns these files, and
        the places of the unchanged items in them.

        `taken`: identities of the files in the newest checkpoint, which are not linked. The newest
        checkpoint may share files with `earlier` if a checkpoint between the two was deleted.
        """
        linked: dict[str, StoredFile] = {}
        if earlier is None:
            return linked, {}
        for name in linkable(items, earlier, unchanged):
            file = earlier.files[name]
            if self._identity(f"{earlier.checkpoint}/{name}") in taken:
                continue
            is_due = 0 < self._check_every <= file.num_links
            if self._link(earlier.checkpoint, str(attempt), file, reads_all=is_due):
                linked[name] = replace(file, num_links=1 if is_due else file.num_links + 1)
        places = {key: earlier.items[key] for key in unchanged}
        return linked, {key: place for key, place in places.items() if place.file in linked}

    def _identities(self, saved: RankFiles | None) -> set[str]:
        """Return the identities of all files in a checkpoint."""
        if saved is None:
            return set()
        return {self._identity(f"{saved.checkpoint}/{name}") for name in saved.files}

    def _identity(self, key: str) -> str:
        """Return the identity of a file, which is the same under each of its names. Return the key
        if the file is missing, or if the store has no hard links."""
        if self._linking is None:
            return key
        try:
            return self._linking.links(key).file
        except HoldfastError:
            return key

    def _link(self, checkpoint: str, attempt: str, file: StoredFile, *, reads_all: bool) -> bool:
        """Link a file of a checkpoint into the attempt. Returns whether the file is unchanged. If
        not, this removes the link, and the caller must write the tensors again.

        `reads_all`: compare the data in the file with its checksums.
        """
        source, target = f"{checkpoint}/{file.name}", f"{attempt}/{file.name}"
        try:
            self._share(source, target)
        except NotFoundError:
            return False  # A user has just deleted the checkpoint.
        except HoldfastError as error:
            logger.warning("%s; its tensors are written again", error.what)
            return False
        # Check the file under its new name: another checkpoint may have just taken the old name.
        table = self._table(target, file)
        if table is not None and not (reads_all and self._is_damaged(checkpoint, target, file)):
            return True
        self._store.remove(target)
        return False

    def _evict(self, key: str) -> None:
        if self._linking is not None:
            self._linking.evict(key)

    def _is_damaged(self, checkpoint: str, key: str, file: StoredFile) -> bool:
        """Whether the data of a file has changed since it was written. Logs the first damage found.

        `key`: the linked file. `checkpoint`: checkpoint that the file comes from.
        """
        try:
            manifest = read_manifest(self._store, checkpoint)
            if manifest.tables.get(file.name) != file.table:
                return True  # Another checkpoint has just taken the name.
            checksums = {file.name: read_checksums(self._store, checkpoint, manifest, file.name)}
            # Read from the disk: a good copy in the page cache would hide damage there.
            self._evict(key)
            reader = RecordReader(self._store, key, file.name, lambda _: None)
            checks = check_files(manifest, [file.name], checksums, lambda _: reader)
            findings = list(run(checks))
            # The file is not needed again. Leave the page cache to training data.
            self._evict(key)
        except HoldfastError as error:
            logger.warning("%s; the tensors in `%s` are written again", error.what, file.name)
            return True
        if findings:
            logger.warning(
                "in `%s`, %s; the tensors in the file are written again, but earlier checkpoints "
                "that share it are damaged: `holdfast verify --mark` marks them",
                self._catalog.where(checkpoint),
                findings[0],
            )
        return bool(findings)


def _matching(
    windows: Iterable[memoryview], stored: Sequence[tuple[int, ...]]
) -> set[tuple[int, ...]]:
    """Return those members of `stored` that equal the block checksums of an item. `windows`: bytes
    of the item. `stored`: block checksums of the item in several checkpoints. Stops reading once no
    member matches."""
    matching, start = {*stored}, 0
    for window in windows:
        for offset in range(0, len(window), WINDOW_BYTES):
            found = tuple(checksum.block_checksums(window[offset : offset + WINDOW_BYTES]))
            stop = start + len(found)
            matching = {one for one in matching if one[start:stop] == found}
            if not matching:
                return matching
            start = stop
    return matching


def _places(items: Sequence[StoredItem]) -> NDArray[np.int64]:
    """Return an array with one row per item: the number of its file, and its `columns`."""
    rows = [(number_of(i.file), i.offset, i.nbytes, i.data_offset, i.first_block) for i in items]
    return np.array(rows, np.int64).reshape(len(rows), 5)


def _no_links(url: str, why: str) -> UsageError:
    return UsageError(
        f"deduplication needs hard links, or a store that copies files, and `{url}` has neither: "
        f"{why}"
    )
