"""Uploads the files of a sealed local folder to an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from holdfast.errors import StorageError
from holdfast.format.checksum import block_checksums
from holdfast.format.seal import BLOCK_BYTES, SEAL, Seal, SealedFile, encode
from holdfast.storage.store import Creating, FileWriter, Store

_FILES_MAX = 4
"""Maximum number of files to upload at once. The store takes a large file in several requests."""

_PIECE_BYTES = 2 * BLOCK_BYTES
"""Bytes that are read from a file at once, a multiple of the block size."""


def upload(store: Store, attempt: str, folder: Path, files: Mapping[str, SealedFile]) -> None:
    """Upload files of a local folder to the hidden folder `attempt` of a store, which has their
    folders already.

    `files`: sizes and checksums by the files' relative paths. Each file is compared with them while
    it is uploaded, to find a file that another thread still changes.

    Raises:
        StorageError: a file has changed, cannot be read, or cannot be uploaded.
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


def make_folders(store: Store, attempt: str, files: Iterable[str]) -> None:
    """Make the folders of these files in the hidden folder `attempt`, before any rank uploads."""
    for name in _folders(files):
        store.make_folder(f"{attempt}/{name}")


def _folders(files: Iterable[str]) -> list[str]:
    """Return the folders of files, each after the folder that contains it."""
    return sorted({str(above) for file in files for above in [*PurePath(file).parents][:-1]})


def _put(store: Creating, key: str, path: Path, sealed: SealedFile) -> None:
    found: list[int] = []

    def see(piece: memoryview) -> None:
        found.extend(block_checksums(piece, BLOCK_BYTES))

    with store.create(key, sealed.nbytes) as writer:
        write_file(writer, path, see=see)
        if tuple(found) != sealed.checksums:
            raise StorageError(
                f"`{path}` has changed while it was saved",
                hint="let all threads finish their files before the save ends",
            )


def write_file(
    writer: FileWriter, path: Path, *, see: Callable[[memoryview], object] = lambda _: None
) -> None:
    """Write the bytes of the local file at `path`, in order. `see`: gets each piece that was
    written. The size of a piece is a multiple of the block size, except for the last one."""
    try:
        with path.open("rb") as opened:
            offset = 0
            # Each piece has memory of its own, since the store may read it later.
            while piece := opened.read(_PIECE_BYTES):
                writer.write(offset, [piece])
                offset += len(piece)
                see(memoryview(piece))
    except OSError as error:
        raise StorageError(f"cannot read `{path}`: {error.strerror or error}") from error


def put_seal(store: Store, attempt: str, seal: Seal) -> None:
    """Upload the seal of a checkpoint whose other files are in the hidden folder `attempt`."""
    for name in reversed(_folders(seal.files)):
        store.sync(f"{attempt}/{name}")
    data = encode(seal)
    with store.create(f"{attempt}/{SEAL}", len(data)) as writer:
        writer.write(0, [data])
