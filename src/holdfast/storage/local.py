"""A `Store` in a folder of a POSIX file system."""

from __future__ import annotations

import errno
import gc
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError
from holdfast.format.names import held_file, hidden_folder_of
from holdfast.storage import links, locks, renaming
from holdfast.storage.direct import BufferedWriter, DirectWriter, open_direct
from holdfast.storage.plain import check_plain, open_plain
from holdfast.storage.publishing import publish_by_rename, unpublish_by_rename
from holdfast.storage.store import Check, FileReader, FileWriter, Links

DIRECT_BYTES_MIN = 4 << 20
"""Minimum size of a file that is written with `O_DIRECT`. For smaller files, the threads cost more
time than they save."""

NO_SPACE = "free some space (df -h), or use another disk"
"""Hint of the error for a full disk."""

_HINTS = {
    errno.EACCES: "check the owner and the rights of the folder: ls -ld",
    errno.EPERM: "check the owner and the rights of the folder: ls -ld",
    errno.EROFS: "the file system is mounted read-only: mount -o remount,rw, or another folder",
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: "the quota is used up: free some space, or use another folder",
    errno.EEXIST: "a file has the name of the folder: move it away, or use another folder",
    errno.ENOTDIR: "a file has the name of the folder: move it away, or use another folder",
    errno.EIO: "the disk reports an input/output error: look at dmesg, use another disk",
    errno.EFBIG: "no file may be that large here: `ulimit -f` shows the limit of this shell, and "
    "the file system has one too",
    errno.EMFILE: "this process has too many files open: `ulimit -n` shows the limit and raises it",
    errno.ENFILE: "too many files are open on this machine: look at fs.file-max (sysctl)",
    errno.ENAMETOOLONG: "choose a shorter name, or a folder with a shorter path",
    errno.ESTALE: "the network file system lost the file: check the mount",
}


class LocalStore:
    """A folder of a local disk, or of a mounted network file system."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)
        self._prefix = os.path.join(self._root, "")

    @property
    def url(self) -> str:
        return self._root

    def _path(self, key: str) -> str:
        # Three times as fast as `os.path.join`, since a listing makes ten paths per checkpoint.
        return (self._prefix + key).rstrip("/") or "/"

    def list(self, folder: str = "") -> Sequence[str]:
        with self._errors_of("list", folder), os.scandir(self._path(folder)) as entries:
            return sorted(map(_listed, entries))

    def list_with_links(self, folder: str) -> tuple[Sequence[str], Collection[str]]:
        with self._errors_of("list", folder), os.scandir(self._path(folder)) as scanned:
            entries = [*scanned]
            is_link = os.DirEntry.is_symlink
            return sorted(map(_listed, entries)), {e.name for e in entries if is_link(e)}

    def size(self, key: str) -> int:
        with self._errors_of("look at", key):
            status = os.stat(self._path(key))
            check_plain(self._path(key), status.st_mode)
            return status.st_size

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self._errors_of("read", key):
            file = open_plain(self._path(key), os.O_RDONLY)
            try:
                # Allocate memory only for bytes that exist: `stop` may be far past the end.
                return _pread(file, start, min(stop, os.fstat(file).st_size))
            finally:
                os.close(file)

    @contextmanager
    def open(self, key: str) -> Iterator[FileReader]:
        with self._errors_of("read", key):
            file = open_plain(self._path(key), os.O_RDONLY)
            try:
                yield _LocalReader(file)
            finally:
                os.close(file)

    def stamp(self, folder: str) -> object:
        """Return a value that changes when any file directly in `folder` changes."""
        with self._errors_of("list", folder), os.scandir(self._path(folder)) as entries:
            files = ((entry.name, _status(entry)) for entry in entries)
            return sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files)

    def changed_at(self, key: str) -> float:
        """Return when a file, or a folder or a file directly in it, last changed, in seconds since
        1970."""
        path = self._path(key)
        with self._errors_of("list", key):
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                return status.st_mtime
            with os.scandir(path) as entries:
                return max((_status(e).st_mtime for e in entries), default=status.st_mtime)

    def leads_out(self, folder: str, file: str) -> bool:
        return links.leads_out(self._path(folder), file)

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[FileWriter]:
        with self._errors_of("write", key), ExitStack() as stack:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file = os.open(self._path(key), flags, 0o666)
            stack.callback(os.close, file)
            _reserve(file, nbytes)
            with self._writing(key, file, nbytes) as writer:
                yield writer
            os.fsync(file)

    @contextmanager
    def join(self, key: str) -> Iterator[FileWriter]:
        with self._errors_of("write", key), ExitStack() as stack:
            file = open_plain(self._path(key), os.O_WRONLY | os.O_NOFOLLOW)
            stack.callback(os.close, file)
            with self._writing(key, file, os.fstat(file).st_size) as writer:
                yield writer

    @contextmanager
    def _writing(self, key: str, file: int, nbytes: int) -> Iterator[FileWriter]:
        """Context that gives a writer for an open file of `nbytes` with the descriptor `file`. All
        bytes are written when the context ends."""
        direct = open_direct(self._path(key)) if nbytes >= DIRECT_BYTES_MIN else None
        if direct is None:
            yield BufferedWriter(file)
            return
        with ExitStack() as stack:
            stack.callback(os.close, direct)
            writer = DirectWriter(direct, file)
            stack.callback(writer.close)
            yield writer
            writer.finish()

    @contextmanager
    def amend(self, key: str) -> Iterator[FileWriter]:
        with self._errors_of("write", key), ExitStack() as stack:
            file = open_plain(self._path(key), os.O_WRONLY | os.O_NOFOLLOW)
            stack.callback(os.close, file)
            yield BufferedWriter(file)
            os.fsync(file)

    def make_folder(self, key: str) -> None:
        with self._errors_of("make the folder", key):
            if key:
                os.mkdir(self._path(key))
            else:
                os.makedirs(self._root, exist_ok=True)

    def sync(self, folder: str) -> None:
        with self._errors_of("sync", folder):
            _sync_folder(self._path(folder))

    def rename(self, source: str, target: str) -> None:
        hidden = hidden_folder_of(target.rpartition("/")[2])
        is_deletion = hidden is not None and hidden.role == "removing"
        doing, key = ("remove", source) if is_deletion else ("publish", target)
        with self._errors_of(doing, key):
            try:
                renaming.rename_exclusive(self._path(source), self._path(target))
            except FileExistsError as error:
                raise ExistsError(f"`{self._path(target)}` exists already") from error
            self._sync_above(target, source)

    def publish(self, folder: str, name: str, *, replace: bool = False) -> None:
        publish_by_rename(self, folder, name, replace=replace)

    def unpublish(self, name: str, removing: str) -> str:
        return unpublish_by_rename(self, name, removing)

    def replace_file(self, source: str, target: str) -> None:
        with self._errors_of("publish", target):
            os.replace(self._path(source), self._path(target))
            self._sync_above(target, source)

    def link(self, source: str, target: str) -> None:
        with self._errors_of("link", target):
            path = self._path(target)
            try:
                os.link(self._path(source), path, follow_symlinks=False)
            except FileNotFoundError as error:
                raise NotFoundError(f"nothing at `{self._path(source)}`") from error
            try:
                check_plain(path, os.lstat(path).st_mode)
            except HoldfastError:
                # The source is not a plain file but a symbolic link, for example. It must not get
                # into a checkpoint.
                os.unlink(path)
                raise

    def links(self, key: str) -> Links:
        with self._errors_of("look at", key):
            status = os.stat(self._path(key))
            return Links(f"{status.st_dev}:{status.st_ino}", status.st_nlink)

    def evict(self, key: str) -> None:
        # macOS does not have this call, so there the file may be read from the cache.
        if hasattr(os, "posix_fadvise"):
            with self._errors_of("evict", key), ExitStack() as stack:
                file = open_plain(self._path(key), os.O_RDONLY)
                stack.callback(os.close, file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _sync_above(self, *keys: str) -> None:
        for folder in dict.fromkeys(os.path.dirname(self._path(key)) for key in keys):
            _sync_folder(folder)

    def remove(self, key: str) -> None:
        with self._errors_of("remove", key):
            path = self._path(key)
            if os.path.isdir(path) and not os.path.islink(path):
                _remove_folder(path)
            else:
                os.unlink(path)

    def free_bytes(self) -> int | None:
        with self._errors_of("measure the free space of", ""):
            status = os.statvfs(self._root)
            return status.f_bavail * status.f_frsize

    @contextmanager
    def lock(self, key: str, note: str) -> Iterator[Check]:
        path = self._path(key)
        lock, lost = self._lock(key, note), False

        def check() -> None:
            nonlocal lock, lost
            if lost or (lock.is_held and not lock.is_at(path)):
                # The folder was moved, or the lock file was removed. Another process may have
                # locked the file that is at this path now.
                lost = True
                lock.release()
                try:
                    lock = self._lock(key, note)
                except ExistsError as error:
                    raise ExistsError(
                        f"this run has lost its folder, which was moved, or whose `{key}` was "
                        f"removed: {error.what}",
                        hint="stop this run, and resume it from the folder that has its "
                        "checkpoints",
                    ) from error
                lost = False

        try:
            yield check
        finally:
            with suppress(OSError):
                lock.write_note("")
            lock.release()

    def _lock(self, key: str, note: str) -> locks.AnyLock:
        path = self._path(key)
        with self._errors_of("lock", key):
            lock = locks.lock_file(path)
            if lock is None:
                # Collect garbage, since an unreferenced manager of this process may hold the lock.
                gc.collect()
                lock = locks.lock_file(path, waits=True)
            if lock is None:
                raise self._in_use(key)
            lock.write_note(note)
        return lock

    def holder(self, key: str) -> str | None:
        return locks.holder_of(self._path(key))

    def _in_use(self, key: str) -> ExistsError:
        """Return the error for a lock that is taken. Its message names the holder."""
        path = self._path(key)
        note = locks.read_note(path) or "unknown"
        if locks.is_held_here(path):
            return ExistsError(
                f"`{self.url}` is held by this process already: {note}",
                hint="close the CheckpointManager that holds it first, by `manager.close()` or by "
                "leaving its `with` block",
            )
        if locks.has_ended(path):
            children = (
                ", ".join(map(str, locks.processes_with(path))) or "none that is visible here"
            )
            return ExistsError(
                f"`{self.url}` is locked: {note}, has ended, but processes that it forked keep "
                f"the lock: {children}",
                hint="end these processes, then start again",
            )
        return ExistsError(
            f"`{self.url}` is in use by another run: {note}",
            hint="wait for that run or stop it, or give this one another folder",
        )

    @contextmanager
    def hold(self, key: str) -> Iterator[bool | None]:
        with ExitStack() as stack:
            with self._errors_of("hold", key):
                held = self._hold(self._path(key), stack)
            yield held

    def _hold(self, path: str, stack: ExitStack) -> bool | None:
        lock: locks.AnyLock | None
        try:
            lock = locks.lock_folder(path)
            if lock is not None:
                stack.callback(lock.release)
        except FileNotFoundError as error:
            raise NotFoundError(f"nothing at `{path}`") from error
        except OSError:
            # NFS cannot lock folders, so try a file beside the folder. Some file systems cannot
            # lock anything, and then this fails too.
            beside = os.path.join(os.path.dirname(path), held_file(os.path.basename(path)))
            try:
                lock = locks.lock_file(beside)
            except (OSError, StorageError):
                return None
            if lock is not None:
                stack.callback(lock.release_and_remove, beside)
                if not os.path.lexists(path):
                    # The last holder has removed the folder and its lock file. So the lock that was
                    # just taken is on a new file, and there is nothing to hold.
                    raise NotFoundError(f"nothing at `{path}`") from None
        return lock is not None

    def _errors_of(self, doing: str, key: str) -> _Errors:
        """Return a context that converts errors of the operating system, as `error_of` does."""
        return _Errors(self, doing, key)

    def error_of(self, error: BaseException, doing: str, key: str) -> HoldfastError | None:
        """Convert an error of the operating system to one of Holdfast. Return None for other
        errors. `doing`, `key`: operation and file, for the message."""
        path = self._path(key)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if isinstance(error, FileNotFoundError) and doing in ("list", "look at", "read"):
                return NotFoundError(f"nothing at `{path}`", file=path)
            hint = f"create the folder first: mkdir -p {self._root}"
            return StorageError(
                f"cannot {doing} `{path}`: {error.strerror}",
                hint=_HINTS.get(error.errno or 0, hint),
                file=path,
            )
        if isinstance(error, MemoryError):
            # This can happen on a small disk too: a sparse file may be larger than memory.
            what = f"cannot {doing} `{path}`: it does not fit into memory"
            return StorageError(what, file=path)
        if isinstance(error, OSError):
            return StorageError(
                f"cannot {doing} `{path}`: {error.strerror or error}",
                hint=_HINTS.get(error.errno or 0),
                file=path,
            )
        return None


class _Errors:
    """Context of one operation, which converts errors: see `LocalStore.error_of`.

    A class, since a generator takes four times as long, and a listing enters five contexts per
    checkpoint.
    """

    __slots__ = ("_doing", "_key", "_store")

    def __init__(self, store: LocalStore, doing: str, key: str) -> None:
        self._store, self._doing, self._key = store, doing, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            known = self._store.error_of(error, self._doing, self._key)
            if known is not None:
                raise known from error


class _LocalReader:
    def __init__(self, file: int) -> None:
        self._file = file

    def read_into(self, start: int, target: memoryview) -> int:
        done = count = os.preadv(self._file, [target], start)
        while count and done < len(target):
            count = os.preadv(self._file, [target[done:]], start + done)
            done += count
        return done


def _reserve(file: int, nbytes: int) -> None:
    """Reserve disk space for `nbytes` of an open file, so that a save to a full disk fails before
    it writes the first byte."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        # Some file systems cannot reserve space. There, the write fails if the disk is full.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _pread(file: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
        # One call reads up to 2 GiB, so most reads have one part, which needs no join.
        part = os.pread(file, stop - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _remove_folder(path: str) -> None:
    import shutil  # Readers do not need this import.

    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        # The process has no file descriptors left. A save may just have failed for this reason.
        # Delete the folder in a way that opens at most one file.
        with suppress(OSError):
            os.rmdir(path)
            return
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def _listed(entry: os.DirEntry[str]) -> str:
    """Return the name of an entry. The name of a folder ends in `/`."""
    try:
        return entry.name + "/" if entry.is_dir() else entry.name
    except OSError:
        # A circular link, or one through a folder without search permission.
        return entry.name


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:
        return entry.stat(follow_symlinks=False)  # A broken link.


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
