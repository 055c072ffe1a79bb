"""Publishes and checks folders that another program fills, whatever the format of their files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path

from holdfast.arguments import checked_flag, checked_path
from holdfast.catalog.catalog import Catalog, location, verify_hint
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.contents import Advance, RecordReader, run
from holdfast.catalog.findings import Finding, finding_of, raise_unreadable, summary_of
from holdfast.catalog.paths import open_for_saving
from holdfast.catalog.replaceable import why_not_removable
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.catalog.upload import make_folders, put_seal, upload
from holdfast.errors import DamagedError, HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format import seal as seals
from holdfast.format.checksum import block_checksums, checksum_of_parts
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import HiddenFolder, folder_among, number_of, visible_name
from holdfast.format.seal import SEAL, Seal, SealedFile
from holdfast.release import installed_version
from holdfast.storage import links
from holdfast.storage.opening import is_url
from holdfast.storage.store import ReadStore
from holdfast.storage.unsynced import UnsyncedStore

_THREADS_MAX = 8

_PIECE_BYTES = 32 << 20
"""Bytes of a file that one thread hashes at a time, a multiple of the block size."""

_WINDOW_BYTES = 256 << 10
"""Bytes that are read and hashed at a time. Few enough to be still in the CPU cache when they are
hashed."""


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A checkpoint whose files another program writes, into a folder that readers ignore."""

    catalog: Catalog
    attempt: HiddenFolder
    is_durable: bool
    """Whether the checkpoint is durable when `publish` returns."""

    temporary: TemporaryFolder | None = None
    """Local folder for the files of a checkpoint in an object store, which `seal` uploads. None if
    the checkpoint is saved to a folder."""

    @property
    def folder(self) -> Path:
        """Folder to fill."""
        if self.temporary is not None:
            return self.temporary.path
        return Path(self.catalog.store.url) / str(self.attempt)

    def seal(self) -> None:
        """Write the seal, and make all files durable if `is_durable`.

        Raises:
            UsageError: the folder holds no file, or something that is neither file nor folder.
            StorageError: a file cannot be read, synced or uploaded.
        """
        if self.temporary is not None:
            seal = seal_of(hash_files(self.folder), self.folder)
            make_folders(self.catalog.store, str(self.attempt), seal.files)
            upload(self.catalog.store, str(self.attempt), self.folder, seal.files)
            put_seal(self.catalog.store, str(self.attempt), seal)
            return
        write_seal(self.folder)
        if self.is_durable:
            sync_files(self.folder)

    def publish(self) -> None:
        """Give the sealed files the name of their checkpoint.

        Raises:
            ExistsError: another checkpoint has taken the name meanwhile.
        """
        self.catalog.publish(self.attempt)
        self.catalog.clean_up(self.attempt.name)
        self._delete_temporary()

    def abort(self) -> None:
        """Delete the folder and all uploaded files."""
        self.catalog.abort(self.attempt)
        self._delete_temporary()

    def _delete_temporary(self) -> None:
        if self.temporary is not None:
            self.temporary.delete()


def begin(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    chosen_id: str = "",
    checks_name: bool = True,
    durable: bool = True,
    temporary: Callable[[], TemporaryFolder] = TemporaryFolder.make,
) -> Unsealed:
    """Create a folder for another program to fill, and clean up after killed processes.

    It is a hidden folder beside `path`. If `path` is in an object store, it is the local folder
    that `temporary` makes.

    `overwrite`: whether a checkpoint at `path` may be replaced. `chosen_id`: eight hexadecimal
    digits for the folder's name; random by default. `checks_name`: whether to refuse to replace a
    file, or a checkpoint to which files were added. `durable`: whether the checkpoint is durable
    when `publish` returns. A checkpoint that replaces another one is always durable: the old one
    may be the only checkpoint to resume from.

    Raises:
        ExistsError: something exists at `path`, and `overwrite` is false or it is no checkpoint.
    """
    catalog, name = open_for_saving(path)
    store = catalog.store
    store.make_folder("")
    execute(store, plan_cleanup(store.list()))
    hint = "choose another path, or pass `overwrite=True` to replace it"
    if checks_name:
        catalog.check_free(name, replace=overwrite, hint=hint)
    if is_url(store.url):
        return _begin_in_store(catalog, name, overwrite, temporary())
    durable = durable or folder_among(store.list(), name) is not None
    if not durable:
        catalog = Catalog(UnsyncedStore(store.url))
    if not checks_name:
        catalog.why_kept = why_not_removable
    attempt = catalog.begin(name, replace=overwrite, chosen_id=chosen_id)
    return Unsealed(catalog, attempt, durable)


def _begin_in_store(
    catalog: Catalog, name: str, overwrite: bool, temporary: TemporaryFolder
) -> Unsealed:
    try:
        attempt = catalog.begin(name, replace=overwrite)
    except BaseException:
        temporary.delete()
        raise
    return Unsealed(catalog, attempt, is_durable=True, temporary=temporary)


@contextmanager
def sealed(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Publish the files that the `with` block writes, all or none, as the folder `path`.

    The context gives an empty folder beside `path`, which readers ignore. At the end of the block,
    every file is hashed, a seal with sizes and checksums is added (`holdfast.seal`), all files are
    synced, and one rename gives the folder its name. If the block raises or the process dies,
    `path` does not change.

    `path` may be the URL of an object store. Then the context gives a local folder below TMPDIR,
    which needs room for the checkpoint. At the end of the block, the files are uploaded, and the
    folder is deleted.

    Call this in one process only. In a job of several processes, call it on rank 0, and end the
    block after the other ranks have written their files.

    `overwrite`: whether to replace a checkpoint at `path`. A folder with other files is never
    replaced.

    Raises:
        ExistsError: something exists at `path`, and may not be replaced.
        UsageError: `path` is not the path of a folder or the URL of an object store, or the block
            has written nothing.
        StorageError: a file cannot be synced, read or uploaded, or the folder cannot be renamed.
    """
    unsealed = begin(checked_path(path, "path"), overwrite=checked_flag(overwrite, "overwrite"))
    try:
        yield unsealed.folder
        unsealed.seal()
        unsealed.publish()
    except BaseException:
        unsealed.abort()
        raise


def write_seal(folder: Path) -> Seal:
    """Hash every file below `folder`, and add the seal. Syncs nothing."""
    seal = seal_of(hash_files(folder), folder)
    with _storage_errors(folder / SEAL), (folder / SEAL).open("xb") as file:
        file.write(seals.encode(seal))
    return seal


def seal_of(files: Mapping[str, SealedFile], where: object) -> Seal:
    """Return the seal of files that were just written. `where`: path or URL for messages.

    Raises:
        UsageError: there is no file.
    """
    if not files:
        raise UsageError(
            f"nothing was written to `{where}`",
            hint="write the files of the checkpoint into the folder that `sealed` gives",
        )
    return Seal(
        files=files,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"holdfast": installed_version()},
    )


def hash_files(folder: Path) -> dict[str, SealedFile]:
    """Delete an old seal, then return the size and the checksums of every file below a folder.

    Raises:
        UsageError: the folder holds something that is neither file nor folder.
        StorageError: a file cannot be read.
    """
    with suppress(FileNotFoundError):
        (folder / SEAL).unlink()
    return _hash_files(folder, _files_to_seal(folder))


def sync_files(folder: Path) -> None:
    """Make everything below `folder` durable: first the files, then the names in each folder.

    Files that are deleted meanwhile are left out.
    """
    files, folders = [], []

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            _fail_to_seal(folder, error)

    for parent, _, names in os.walk(folder, onerror=fail):
        files += [Path(parent, name) for name in names]
        folders.append(Path(parent))
    with ThreadPoolExecutor(_THREADS_MAX, thread_name_prefix="holdfast-seal") as pool:
        try:
            synced = pool.map(sync_path, files)
        except RuntimeError:
            # No thread can start: a limit of the system is reached, or the program ends, and Python
            # is older than 3.12.3.
            synced = map(sync_path, files)
        for _ in synced:
            pass
    for inner in reversed(folders):
        sync_path(inner)


def _fail_to_seal(folder: Path, error: OSError) -> None:
    raise StorageError(f"cannot seal `{folder}`: {error}") from error


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable, unless it has been deleted."""
    with _storage_errors(path), suppress(FileNotFoundError):
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _files_to_seal(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder."""
    files = []
    for parent, inner, names in os.walk(folder, onerror=partial(_fail_to_seal, folder)):
        for name in (*inner, *names):
            path = Path(parent, name)
            mode = path.stat().st_mode if path.exists() else 0
            is_link_to_folder = path.is_symlink() and stat.S_ISDIR(mode)
            leads_out = path.is_symlink() and links.leads_out(
                str(folder), path.relative_to(folder).as_posix()
            )
            is_known = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
            if is_link_to_folder or leads_out or not is_known:
                raise UsageError(
                    f"`{path.relative_to(folder)}` is neither a file nor a folder of its own",
                    hint="a checkpoint must hold its files itself: copy what the link leads to",
                )
            if stat.S_ISREG(mode):
                files.append(path.relative_to(folder).as_posix())
    return sorted(files)


def _hash_files(folder: Path, files: Sequence[str]) -> dict[str, SealedFile]:
    """Return the size and the checksums of each file. All cores share the work on a large file."""
    threads = min(_THREADS_MAX, os.cpu_count() or 1)
    sizes = {file: (folder / file).stat().st_size for file in files}
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-seal") as pool:
        pieces = {
            file: [
                pool.submit(_hash_piece, folder / file, start, min(start + _PIECE_BYTES, nbytes))
                for start in range(0, nbytes, _PIECE_BYTES)
            ]
            for file, nbytes in sizes.items()
        }
        return {
            file: SealedFile(nbytes, tuple(chain.from_iterable(p.result() for p in pieces[file])))
            for file, nbytes in sizes.items()
        }


def _hash_piece(path: Path, start: int, stop: int) -> list[int]:
    """Return the checksum of each block of a file from byte `start` to byte `stop`."""
    window = memoryview(bytearray(_WINDOW_BYTES))
    with _storage_errors(path), path.open("rb", buffering=0) as file:
        file.seek(start)

        def windows(nbytes: int) -> Iterator[memoryview]:
            while nbytes and (count := file.readinto(window[:nbytes])):
                yield window[:count]
                nbytes -= count

        return [
            checksum_of_parts(windows(min(seals.BLOCK_BYTES, stop - block)))
            for block in range(start, stop, seals.BLOCK_BYTES)
        ]


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot seal `{path}`: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------- check


def is_sealed(store: ReadStore, name: str) -> bool:
    """Return whether a folder has a seal. False if the folder cannot be listed."""
    try:
        return SEAL in store.list(name)
    except HoldfastError:
        return False


def has_seal(store: ReadStore, name: str) -> bool:
    """Like `is_sealed`, but raise a StorageError if a store in a network does not answer: then
    nobody knows."""
    try:
        return SEAL in store.list(name)
    except HoldfastError as error:
        if is_url(store.url) and not isinstance(error, NotFoundError):
            raise
        return False


def read_seal(store: ReadStore, name: str) -> Seal:
    """Read the seal of a folder.

    Raises:
        NotFoundError: the folder has no seal.
        DamagedError, FormatError: the seal cannot be read.
    """
    key = f"{name}/{SEAL}"
    return decode_seal(store, name, store.read(key, 0, store.size(key)))


def decode_seal(store: ReadStore, name: str, data: bytes) -> Seal:
    """Decode the bytes of the seal of a folder. Raises a DamagedError or FormatError."""
    return seals.decode(data, where=f"{location(store, name)}/{SEAL}")


def open_sealed(store: ReadStore, name: str) -> Manifest:
    """Open a sealed folder. The manifest lists its files with their sizes, but no entries.

    Raises:
        DamagedError: a file is missing or has another size.
        StorageError: a file cannot be read now.
    """
    seal = read_seal(store, name)
    findings = check_seal(store, name, seal, quick=True)
    raise_unreadable(location(store, name), findings)
    if findings:
        raise DamagedError(
            f"`{location(store, name)}` is damaged: {summary_of(findings)}",
            hint=verify_hint(location(store, name)),
        )
    return Manifest(
        {},
        {},
        files={file: sealed_file.nbytes for file, sealed_file in seal.files.items()},
        step=number_of(name.rpartition("/")[2]),
        kind="full",
        created=seal.created,
        versions=seal.versions,
    )


def check_seal(
    store: ReadStore,
    name: str,
    seal: Seal,
    *,
    quick: bool = False,
    advance: Advance = lambda _: None,
) -> list[Finding]:
    """Compare the files of a folder with its seal.

    `quick`: compare sizes only.
    """
    findings = []
    whole = []
    for file, sealed_file in seal.files.items():
        finding = _size_finding(store, name, file, sealed_file)
        if finding is not None:
            findings.append(finding)
        else:
            whole.append(file)
    if not quick:
        findings += run(
            partial(_check_file, store, name, file, seal.files[file], advance) for file in whole
        )
    return findings


def _size_finding(
    store: ReadStore, name: str, file: str, sealed_file: SealedFile
) -> Finding | None:
    try:
        if store.leads_out(name, file):
            return Finding("file", file, "is a link to a place outside of its folder")
        nbytes = store.size(f"{name}/{file}")
    except HoldfastError as error:
        return finding_of("file", file, error)
    if nbytes != sealed_file.nbytes:
        return Finding("file", file, f"has {nbytes} bytes, {sealed_file.nbytes} were written")
    return None


def _check_file(
    store: ReadStore, name: str, file: str, sealed_file: SealedFile, advance: Advance
) -> list[Finding]:
    reader = RecordReader(store, f"{name}/{file}", file, advance)
    found: list[int] = []
    try:
        for window in reader.windows(Span(0, sealed_file.nbytes)):
            found += block_checksums(window, seals.BLOCK_BYTES)
    except HoldfastError as error:
        return [finding_of("file", file, error)]
    for block, (one, expected) in enumerate(zip(found, sealed_file.checksums, strict=False)):
        if one != expected:
            what = f"block {block} has checksum {one:016x}, the seal says {expected:016x}"
            return [Finding("data", file, what)]
    if len(found) != len(sealed_file.checksums):
        return [Finding("file", file, "ended while it was read")]
    return []


def matching(store: ReadStore, pattern: re.Pattern[str]) -> list[str]:
    """Return the folders at the root of a store whose names match `pattern`, newest first. They are
    sorted by the last number in their name, then by name."""
    folders = [n.rstrip("/") for n in store.list() if n.endswith("/")]

    # A save that was killed between two renames has left the good folder under a `.replaced` name.
    names = {folder: name for folder in folders if (name := visible_name(folder)) is not None}
    taken = {name for folder, name in names.items() if folder == name}
    found = {
        folder: name
        for folder, name in names.items()
        if pattern.fullmatch(name) and (folder == name or name not in taken)
    }

    def age(folder: str) -> tuple[int, str]:
        number = number_of(found[folder])
        return (-1 if number is None else number), found[folder]

    return sorted(found, key=age, reverse=True)
