"""Publish and check folders that another program fills: no format is known, only files."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from holdfast.arguments import checked_flag, checked_path
from holdfast.catalog.catalog import Catalog, location, verify_hint
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.contents import Advance, RecordReader, run
from holdfast.catalog.findings import Finding, summary_of
from holdfast.catalog.paths import open_for_saving
from holdfast.errors import DamagedError, HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format import seal as seals
from holdfast.format.checksum import block_checksums
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import HiddenFolder, hidden_folder_of, number_of
from holdfast.format.seal import SEAL, Seal, SealedFile
from holdfast.release import installed_version
from holdfast.storage import links
from holdfast.storage.store import ReadStore

logger: logging.Logger = logging.getLogger("holdfast")

_THREADS_MAX = 8


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A folder that is being filled. Readers ignore it."""

    catalog: Catalog
    attempt: HiddenFolder

    @property
    def folder(self) -> Path:
        return Path(self.catalog.store.url) / str(self.attempt)

    def publish(self) -> None:
        """Make all files durable, write the seal, and give the folder its name.

        Raises:
            UsageError: the folder holds no file, or something that is neither file nor folder.
            ExistsError: another checkpoint has taken the name meanwhile.
            StorageError: a file cannot be read or synced.
        """
        write_seal(self.folder)
        self.catalog.publish(self.attempt)
        leftovers = plan_cleanup(self.catalog.store.list(), only=self.attempt.name)
        for problem in execute(self.catalog.store, leftovers):
            logger.warning("%s; the next save tries again", problem)

    def abort(self) -> None:
        """Delete the folder."""
        with suppress(HoldfastError):
            self.catalog.abort(self.attempt)


def begin(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    chosen_id: str = "",
    may_hold_others: bool = False,
) -> Unsealed:
    """Make the folder to fill, beside `path`, and clean up after killed processes.

    `chosen_id`: eight hexadecimal digits for the folder's name; random ones by default.
    `may_hold_others`: also replace a checkpoint to which files were added.

    Raises:
        ExistsError: something exists at `path`, and `overwrite` is false or it is no checkpoint.
    """
    catalog, name = open_for_saving(path)
    store = catalog.store
    store.make_folder("")
    execute(store, plan_cleanup(store.list()))
    hint = "choose another path, or pass `overwrite=True` to replace it"
    if not may_hold_others:
        catalog.check_free(name, replace=overwrite, hint=hint)
    return Unsealed(catalog, catalog.begin(name, replace=overwrite, chosen_id=chosen_id))


@contextmanager
def sealed(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Publish the files that the `with` block writes, all or none, as the folder `path`.

    The context gives an empty folder beside `path`, which readers ignore. At its end every file is
    synced and hashed, a seal with sizes and checksums is added (`holdfast.seal`), and one rename
    gives the folder its name. If the block raises, or the process dies, `path` is as it was.

    One process calls this. In a job of several, that is rank 0, after the others have written.

    `overwrite`: replace the checkpoint at `path`; a folder with files of others is never replaced.

    Raises:
        ExistsError: something exists at `path`, and may not be replaced.
        UsageError: `path` is no path of a folder, or the block has written nothing.
        StorageError: a file cannot be synced or read, or the folder cannot be renamed.
    """
    unsealed = begin(checked_path(path, "path"), overwrite=checked_flag(overwrite, "overwrite"))
    try:
        yield unsealed.folder
        unsealed.publish()
    except BaseException:
        unsealed.abort()
        raise


def write_seal(folder: Path) -> Seal:
    """Sync every file below `folder`, and add the seal."""
    with suppress(FileNotFoundError):
        (folder / SEAL).unlink()
    files, folders = _walk(folder)
    if not files:
        raise UsageError(
            f"nothing was written to `{folder}`",
            hint="write the files of the checkpoint into the folder that `sealed` gives",
        )
    threads = min(_THREADS_MAX, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-seal") as pool:
        hashed = [pool.submit(_sync_and_hash, folder / file) for file in files]
        contents = {file: one.result() for file, one in zip(files, hashed, strict=True)}
    seal = Seal(
        files=contents,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"holdfast": installed_version()},
    )
    data = seals.encode(seal)
    with _storage_errors(folder / SEAL), (folder / SEAL).open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    for inner in folders:
        with _storage_errors(inner):
            _sync(inner)
    return seal


def _walk(folder: Path) -> tuple[list[str], list[Path]]:
    """All files below a folder, by relative path, and all folders, innermost first."""
    files, folders = [], []

    def fail(error: OSError) -> None:
        raise StorageError(f"cannot seal `{folder}`: {error}")

    for parent, inner, names in os.walk(folder, onerror=fail):
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
        folders.append(Path(parent))
    return sorted(files), folders[::-1]


def _sync_and_hash(path: Path) -> SealedFile:
    checksums: list[int] = []
    nbytes = 0
    buffer = memoryview(bytearray(seals.BLOCK_BYTES))
    with _storage_errors(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while count := _fill(file, buffer):
                checksums += block_checksums(buffer[:count], seals.BLOCK_BYTES)
                nbytes += count
            os.fsync(file)
        finally:
            os.close(file)
    return SealedFile(nbytes, tuple(checksums))


def _fill(file: int, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends. Returns the bytes read."""
    done = 0
    while done < len(buffer) and (count := os.readv(file, [buffer[done:]])):
        done += count
    return done


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot seal `{path}`: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------- check


def is_sealed(store: ReadStore, name: str) -> bool:
    """Whether a folder has a seal."""
    try:
        return SEAL in store.list(name)
    except HoldfastError:
        return False


def read_seal(store: ReadStore, name: str) -> Seal:
    """Read the seal of a folder.

    Raises:
        NotFoundError: it has none.
        DamagedError, FormatError: it cannot be read.
    """
    key = f"{name}/{SEAL}"
    return seals.decode(
        store.read(key, 0, store.size(key)), where=f"{location(store, name)}/{SEAL}"
    )


def open_sealed(store: ReadStore, name: str) -> Manifest:
    """Open a sealed folder as its files. It has no entries, and every file has its size.

    Raises:
        DamagedError: a file is missing or has another size.
    """
    seal = read_seal(store, name)
    if findings := check_seal(store, name, seal, quick=True):
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
        if problem := _size_problem(store, name, file, sealed_file):
            findings.append(Finding("file", file, problem))
        else:
            whole.append(file)
    if not quick:
        findings += run(
            partial(_check_file, store, name, file, seal.files[file], advance) for file in whole
        )
    return findings


def _size_problem(store: ReadStore, name: str, file: str, sealed_file: SealedFile) -> str | None:
    try:
        if store.leads_out(name, file):
            return "is a link to a place outside of its folder"
        nbytes = store.size(f"{name}/{file}")
    except NotFoundError:
        return "is missing"
    except HoldfastError as error:
        return f"cannot be read: {error.what}"
    if nbytes != sealed_file.nbytes:
        return f"has {nbytes} bytes, {sealed_file.nbytes} were written"
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
        return [Finding("file", file, f"cannot be read: {error.what}")]
    for block, (one, expected) in enumerate(zip(found, sealed_file.checksums, strict=False)):
        if one != expected:
            what = f"block {block} has checksum {one:016x}, the seal says {expected:016x}"
            return [Finding("data", file, what)]
    if len(found) != len(sealed_file.checksums):
        return [Finding("file", file, "ended while it was read")]
    return []


def matching(store: ReadStore, pattern: str | re.Pattern[str]) -> list[str]:
    """Names of the folders at the root of a store that match, the newest first: by the last number
    in their name, then by name."""
    folders = [n.rstrip("/") for n in store.list() if n.endswith("/")]

    def is_wanted(name: str) -> bool:
        if isinstance(pattern, str):
            return fnmatch.fnmatchcase(name, pattern)
        return pattern.fullmatch(name) is not None

    # A save that was killed between two renames has left the good folder under a hidden name.
    names = {
        f: h.name if (h := hidden_folder_of(f)) and h.role == "replaced" else f for f in folders
    }
    taken = {name for folder, name in names.items() if folder == name}
    found = {
        folder: name
        for folder, name in names.items()
        if is_wanted(name) and (folder == name or name not in taken)
    }

    def age(folder: str) -> tuple[int, str]:
        number = number_of(found[folder])
        return (-1 if number is None else number), found[folder]

    return sorted(found, key=age, reverse=True)
