"""Copies checkpoints from a store to a local folder, for programs that read files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.catalog.catalog import location, verify_hint
from holdfast.catalog.seal import sync_files
from holdfast.catalog.temporary import ROOM
from holdfast.errors import DamagedError, FormatError, NotFoundError, StorageError
from holdfast.format.checksum import block_checksums
from holdfast.format.seal import BLOCK_BYTES, SEAL, Seal, SealedFile, encode
from holdfast.spelling import rate
from holdfast.storage.store import ReadStore

logger: logging.Logger = logging.getLogger("holdfast")

_THREADS = 4

_PIECE_BYTES = 4 * BLOCK_BYTES
"""Bytes that a thread reads at once, a multiple of the block size. A store that is reached over a
network answers several requests for them at the same time."""


def fetch(
    store: ReadStore, name: str, folder: Path, seal: Seal | None, *, hint: str = ROOM
) -> None:
    """Copy the checkpoint `name` of a store to the new folder `folder`.

    `seal`: seal of the checkpoint. Every byte is compared with it while it is copied. None: all
    files are copied without a check, and are durable on return. `hint`: next step if the disk is
    full.

    Raises:
        DamagedError: a file differs from the seal, or is missing.
        FormatError: the seal is invalid, or a file has a name that no file can have.
        NotFoundError: there is no folder `name`.
        StorageError: a file cannot be read, or cannot be written because the disk is full.
    """
    started = time.perf_counter()
    sealed: Mapping[str, SealedFile | None]
    sealed = seal.files if seal is not None else dict.fromkeys(files_below(store, name))
    with _storage_errors(folder, hint):
        folder.mkdir(parents=True)
    files = [_File(store, name, file, of_seal, folder, hint) for file, of_seal in sealed.items()]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-fetch") as pool:
        try:
            created = zip(files, pool.map(_File.create, files), strict=True)
            copies = [pool.submit(file.copy, start) for file, starts in created for start in starts]
            nbytes = sum(copy.result() for copy in copies)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if seal is None:
        # Nothing could tell after a power cut that a copy is torn.
        sync_files(folder)
    else:
        with _storage_errors(folder, hint):
            (folder / SEAL).write_bytes(encode(seal))
    where, seconds = location(store, name), time.perf_counter() - started
    logger.info("fetched `%s`: %s", where, rate(nbytes, seconds))


def fetch_file(store: ReadStore, key: str, folder: Path) -> None:
    """Copy one file of a store to a folder, without a check."""
    started = time.perf_counter()
    above, _, name = key.rpartition("/")
    file = _File(store, above, name, None, folder, ROOM)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-fetch") as pool:
        nbytes = sum(pool.map(file.copy, file.create()))
    seconds = time.perf_counter() - started
    logger.info("fetched `%s`: %s", location(store, key), rate(nbytes, seconds))


@dataclass(frozen=True, slots=True)
class _File:
    """One file to copy."""

    store: ReadStore
    name: str
    """Name of the checkpoint."""

    file: str
    """Path of the file in the checkpoint."""

    sealed: SealedFile | None
    """Size and checksums by the seal; None without a seal."""

    folder: Path
    hint: str
    """Next step if the disk is full."""

    @property
    def key(self) -> str:
        return f"{self.name}/{self.file}".lstrip("/")

    @property
    def target(self) -> Path:
        return self.folder / self.file

    def create(self) -> range:
        """Create the copy in its full size. Return the offset of each piece."""
        try:
            nbytes = self.store.size(self.key)
        except NotFoundError as error:
            raise self._damaged("is missing") from error
        if self.sealed is not None and nbytes != self.sealed.nbytes:
            raise self._damaged(f"has {nbytes} bytes, {self.sealed.nbytes} were written")
        with _storage_errors(self.target, self.hint):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with self.target.open("xb") as file:
                if nbytes:
                    # Reserve the space, so that a full disk is known before anything is read.
                    os.posix_fallocate(file.fileno(), 0, nbytes)
        return range(0, nbytes, _PIECE_BYTES)

    def copy(self, start: int) -> int:
        """Copy and check one piece. Return its number of bytes."""
        stop = min(start + _PIECE_BYTES, self.target.stat().st_size)
        piece = memoryview(bytearray(stop - start))
        try:
            with self.store.open(self.key) as reader:
                nbytes = reader.read_into(start, piece)
        except NotFoundError as error:
            raise self._damaged("is missing") from error
        if nbytes < len(piece):
            raise self._damaged("ended while it was read")
        if self.sealed is not None:
            first = start // BLOCK_BYTES
            for block, found in enumerate(block_checksums(piece, BLOCK_BYTES), first):
                if found != (expected := self.sealed.checksums[block]):
                    raise self._damaged(
                        f"block {block} has checksum {found:016x}, the seal says {expected:016x}"
                    )
        with _storage_errors(self.target, self.hint), self.target.open("r+b", buffering=0) as file:
            offset = start
            while offset < stop:
                offset += os.pwrite(file.fileno(), piece[offset - start :], offset)
        return nbytes

    def _damaged(self, what: str) -> DamagedError:
        where = location(self.store, self.name)
        file = f"{where}/{self.file}"
        return DamagedError(f"`{file}`: {what}", hint=verify_hint(where), file=file)


def files_below(store: ReadStore, name: str) -> Iterator[str]:
    """Yield the paths of all files in a folder, in its folders too."""
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        for entry in store.list(f"{name}/{parent}".rstrip("/")):
            if entry.rstrip("/") in ("", ".", ".."):
                raise FormatError(
                    f"`{location(store, name)}` holds `{parent}{entry}`, which is not a valid name"
                )
            if entry.endswith("/"):
                waiting.append(f"{parent}{entry}")
            else:
                yield f"{parent}{entry}"


@contextmanager
def _storage_errors(path: Path, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot copy to `{path}`: {error.strerror or error}"
        raise StorageError(what, hint=hint) from error
