"""Puts the files of a sealed folder of this machine into an object store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from holdfast.errors import StorageError
from holdfast.format.checksum import block_checksums
from holdfast.format.seal import BLOCK_BYTES, SEAL, Seal, SealedFile, encode
from holdfast.storage.store import Creating, FileWriter

_FILES_MAX = 4
"""Most files that are put at the same time. The store sends a large file by several requests."""

_PIECE_BYTES = 2 * BLOCK_BYTES
"""Bytes that are read from a file at once, a multiple of the block size."""


def upload(store: Creating, attempt: str, folder: Path, files: Mapping[str, SealedFile]) -> None:
    """Put files of a folder into the hidden folder `attempt` of a store.

    `files`: sizes and checksums by the files' relative paths. Each file is compared with them while
    it is read, so that a file that another thread still changes is an error.

    Raises:
        StorageError: a file has changed, cannot be read, or cannot be put.
    """
    with ThreadPoolExecutor(_FILES_MAX, thread_name_prefix="holdfast-seal") as pool:
        puts = [
            pool.submit(_put, store, f"{attempt}/{file}", folder / file, sealed)
            for file, sealed in files.items()
        ]
        try:
            for put in puts:
                put.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _put(store: Creating, key: str, path: Path, sealed: SealedFile) -> None:
    found: list[int] = []
    with store.create(key, sealed.nbytes) as writer:
        for piece in write_file(writer, path):
            found += block_checksums(piece, BLOCK_BYTES)
        if tuple(found) != sealed.checksums:
            raise StorageError(
                f"`{path}` has changed while it was saved",
                hint="let all threads finish their files before the save ends",
            )


def write_file(writer: FileWriter, path: Path) -> Iterator[memoryview]:
    """Write the bytes of the file at `path` of this machine, in order. Yield each piece that was
    written: its size is a multiple of the block size, except for the last one."""
    try:
        with path.open("rb") as opened:
            offset = 0
            # Each piece has memory of its own, since the store may read it later.
            while piece := opened.read(_PIECE_BYTES):
                writer.write(offset, [piece])
                offset += len(piece)
                yield memoryview(piece)
    except OSError as error:
        raise StorageError(f"cannot read `{path}`: {error.strerror or error}") from error


def put_seal(store: Creating, attempt: str, seal: Seal) -> None:
    """Put the seal of a checkpoint whose other files are in the hidden folder `attempt`."""
    data = encode(seal)
    with store.create(f"{attempt}/{SEAL}", len(data)) as writer:
        writer.write(0, [data])
