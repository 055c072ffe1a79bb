"""A folder of a POSIX file system as a `Store`."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from holdfast.errors import ExistsError, NotFoundError, StorageError
from holdfast.storage.direct import BufferedWriter, DirectWriter, open_direct
from holdfast.storage.store import Reader, Writer

DIRECT_BYTES_MIN = 4 << 20
"""Smaller files are not worth the threads."""

_HINTS = {
    errno.EACCES: "check the owner and the rights of the folder: ls -ld",
    errno.EPERM: "check the owner and the rights of the folder: ls -ld",
    errno.EROFS: "the file system is mounted read-only: mount -o remount,rw, or another folder",
    errno.ENOSPC: "free some space (df -h), lower `checkpoint.keep_latest_k`, or use another disk",
    errno.EDQUOT: "the quota is used up: free some space, or use another folder",
    errno.EEXIST: "a file stands where a folder should: move it away, or use another folder",
    errno.ENOTDIR: "a file stands where a folder should: move it away, or use another folder",
    errno.EIO: "the disk reports an input/output error: look at dmesg, use another disk",
    errno.ESTALE: "the network file system lost the file: check the mount",
}


class LocalStore:
    """A folder of this machine, or of a network file system mounted on it."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)

    @property
    def url(self) -> str:
        return self._root

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key).rstrip("/") or "/"

    def list(self, folder: str = "") -> Sequence[str]:
        with self._said("list", folder), os.scandir(self._path(folder)) as entries:
            return sorted(e.name + "/" if e.is_dir() else e.name for e in entries)

    def size(self, key: str) -> int:
        with self._said("look at", key):
            found = os.stat(self._path(key))
            if stat.S_ISDIR(found.st_mode):
                raise NotFoundError(f"`{self._path(key)}` is a folder, not a file")
            return found.st_size

    def read(self, key: str, start: int, stop: int) -> bytes:
        buffer = bytearray(max(0, min(stop, self.size(key)) - start))
        return bytes(buffer[: self.read_into(key, start, memoryview(buffer))])

    def read_into(self, key: str, start: int, target: memoryview) -> int:
        with self.open(key) as reader:
            return reader.read_into(start, target)

    @contextmanager
    def open(self, key: str) -> Iterator[Reader]:
        with self._said("read", key):
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield _LocalReader(file)
            finally:
                os.close(file)

    def stamp(self, folder: str) -> object:
        """Equal to an earlier one for as long as no file directly in a folder has changed."""
        with self._said("list", folder), os.scandir(self._path(folder)) as entries:
            found = ((entry.name, _looked_at(entry)) for entry in entries)
            return sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in found)

    def leads_out(self, folder: str, file: str) -> bool:
        path = os.path.join(self._path(folder), file)
        if not os.path.islink(path):
            return False
        inside = os.path.realpath(self._path(folder))
        return os.path.commonpath((inside, os.path.realpath(path))) != inside

    @contextmanager
    def create(self, key: str, nbytes: int) -> Iterator[Writer]:
        with self._said("write", key), ExitStack() as stack:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file = os.open(self._path(key), flags, 0o666)
            stack.callback(os.close, file)
            _reserve(file, nbytes)
            direct = open_direct(self._path(key)) if nbytes >= DIRECT_BYTES_MIN else None
            if direct is None:
                yield BufferedWriter(file)
            else:
                stack.callback(os.close, direct)
                writer = DirectWriter(direct, file)
                stack.callback(writer.close)
                yield writer
                writer.finish()
            os.fsync(file)

    @contextmanager
    def amend(self, key: str) -> Iterator[Writer]:
        """A file that is there, in its full length, for several processes to write their parts of.
        What this one wrote is durable when the context ends well."""
        with self._said("write", key), ExitStack() as stack:
            file = os.open(self._path(key), os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            yield BufferedWriter(file)
            os.fsync(file)

    def make_folder(self, key: str) -> None:
        with self._said("make the folder", key):
            if key:
                os.mkdir(self._path(key))
            else:
                os.makedirs(self._root, exist_ok=True)

    def sync(self, folder: str) -> None:
        with self._said("sync", folder):
            _sync_folder(self._path(folder))

    def rename(self, source: str, target: str) -> None:
        with self._said("publish", target):
            # rename(2) would take the place of an empty folder, so that is looked for first. Two
            # writers cannot race here: the lock keeps the second one out.
            if os.path.lexists(self._path(target)):
                raise ExistsError(f"`{self._path(target)}` exists already")
            os.rename(self._path(source), self._path(target))
            folders = (os.path.dirname(self._path(key)) for key in (target, source))
            for folder in dict.fromkeys(folders):
                _sync_folder(folder)

    def remove(self, key: str) -> None:
        with self._said("remove", key):
            path = self._path(key)
            if os.path.isdir(path) and not os.path.islink(path):
                import shutil  # Whoever only looks at a store need not wait for it.

                shutil.rmtree(path)
            else:
                os.unlink(path)

    def free_bytes(self) -> int | None:
        with self._said("measure the free space of", ""):
            found = os.statvfs(self._root)
            return found.f_bavail * found.f_frsize

    @contextmanager
    def lock(self, key: str, note: str) -> Iterator[None]:
        with self._said("lock", key):
            file = os.open(self._path(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with self._said("lock", key):
                try:
                    # Held by the open file, so the system lets go of it when the process dies.
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.pread(file, 1024, 0).decode(errors="replace").strip()
                    raise ExistsError(
                        f"`{self.url}` is in use by another run: {holder or 'unknown'}",
                        hint="wait for that run or stop it, or give this one another "
                        "`checkpoint.folder`",
                    ) from None
                os.ftruncate(file, 0)
                os.pwrite(file, note.encode(), 0)
            try:
                yield
            finally:
                # Only by the holder: whoever was refused must leave the holder's note alone.
                with suppress(OSError):
                    os.ftruncate(file, 0)
        finally:
            os.close(file)

    @contextmanager
    def hold(self, folder: str) -> Iterator[bool | None]:
        """Hold a folder, whatever it is called meanwhile, until the context ends or the process
        dies. Gives whether it is held: false where somebody else does so, None where this file
        system cannot tell."""
        with self._said("hold", folder):
            file = os.open(self._path(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held: bool | None = True
            except BlockingIOError:
                held = False
            except OSError:
                held = None
            yield held
        finally:
            os.close(file)

    @contextmanager
    def _said(self, doing: str, key: str) -> Iterator[None]:
        """Turn what the system says into what the user needs to know."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            path = self._path(key)
            if isinstance(error, NotADirectoryError) or doing not in ("list", "look at", "read"):
                raise StorageError(
                    f"cannot {doing} `{path}`: {error.strerror}",
                    hint=_HINTS.get(error.errno or 0, f"`{self._root}` must be there: mkdir -p"),
                ) from error
            raise NotFoundError(f"nothing at `{path}`") from error
        except OSError as error:
            raise StorageError(
                f"cannot {doing} `{self._path(key)}`: {error.strerror or error}",
                hint=_HINTS.get(error.errno or 0),
            ) from error


class _LocalReader:
    def __init__(self, file: int) -> None:
        self._file = file

    def read_into(self, start: int, target: memoryview) -> int:
        done = 0
        while done < len(target):
            count = os.preadv(self._file, [target[done:] if done else target], start + done)
            if not count:
                break
            done += count
        return done


def _reserve(file: int, nbytes: int) -> None:
    """Take the space now, so that a full disk is found before the first byte is written."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        # Some file systems cannot reserve; there the write itself finds out.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _looked_at(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except FileNotFoundError:
        return entry.stat(follow_symlinks=False)  # A link to nothing.


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
