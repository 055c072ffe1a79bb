"""Record the file operations of Python code without a `Store`, such as other libraries."""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.storage import renaming
from holdfast.testing.disk import Operation, SimulatedDisk, Tree, Verb

Timed = tuple[int, Operation]
"""Time in nanoseconds, on a clock that all processes of the machine share, and operation."""


@contextmanager
def recorded_folder(folder: str | os.PathLike[str]) -> Iterator[list[Timed]]:
    """Record the operations of this process on files below `folder` through `open` and `os`.

    Does not see operations of native code. To show that there were none, compare `tree_after` the
    operations with `tree_at` the folder.
    """
    recorder = _Recorder(os.path.realpath(folder))
    hooks: list[tuple[Any, str, Any]] = [
        (os, name, getattr(recorder, f"_{name}")) for name in _HOOKED
    ]
    hooks += [(os, "remove", recorder._unlink), (os, "fdatasync", recorder._fsync)]
    hooks += [(os, "replace", recorder._rename)]
    hooks += [(renaming, "rename_exclusive", recorder._rename_exclusive)]
    hooks += [(home, "open", recorder.open_file) for home in (builtins, io)]
    real = [(home, name, getattr(home, name)) for home, name, _ in hooks]
    try:
        for home, name, hook in hooks:
            setattr(home, name, hook)
        yield recorder.operations
    finally:
        for home, name, function in real:
            setattr(home, name, function)


def merged(records: Sequence[Sequence[Timed]]) -> list[Operation]:
    """Merge the records of several processes in order of time."""
    timed = sorted((entry for record in records for entry in record), key=lambda entry: entry[0])
    return [operation for _, operation in timed]


def tree_after(operations: Sequence[Operation]) -> Tree:
    """Return the tree that the operations make in an empty folder."""
    disk = SimulatedDisk()
    for operation in operations:
        disk.apply(operation)
    return disk.survivors("killed", 0)


def tree_at(folder: str | os.PathLike[str]) -> Tree:
    """Read all files and folders below a folder."""
    root = Path(folder)
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write_tree(tree: Tree, folder: str | os.PathLike[str]) -> None:
    """Write a tree below a folder, which must be empty or absent."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    for path, data in tree.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


_OF_FILES = ("open", "close", "write", "pwrite", "pwritev", "ftruncate", "posix_fallocate", "fsync")
_OF_NAMES = ("mkdir", "rmdir", "unlink", "rename", "sendfile")
_HOOKED = (*_OF_FILES, *_OF_NAMES)
_REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _HOOKED}
_REAL_OPEN = io.open


class _Recorder:
    """Replacements for functions of `os`, each in the method of that name."""

    def __init__(self, root: str) -> None:
        self.operations: list[Timed] = []
        self._root = root
        self._files: dict[int, tuple[str, int]] = {}
        """Path and inode of each open file below the root, by descriptor."""

        self._mutex = threading.RLock()

    def _keep(self, verb: Verb, path: str, **more: Any) -> None:
        self.operations.append((time.monotonic_ns(), Operation(verb, path, **more)))

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the path relative to the root; None if it is outside."""
        if isinstance(path, int):
            return None
        name = os.fsdecode(path)
        if dir_fd is not None:
            name = f"{Path(f'/proc/self/fd/{dir_fd}').readlink()}/{name}"
        # Do not resolve the last part: an operation on a link changes the link.
        above, last = os.path.split(os.path.abspath(name))  # noqa: PTH100
        full = f"{os.path.realpath(above)}/{last}"
        if full == self._root:
            return ""
        return full[len(self._root) + 1 :] if full.startswith(f"{self._root}/") else None

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        below = self._below(path, dir_fd)
        with self._mutex:
            new = below is not None and not os.path.lexists(f"{self._root}/{below}")
            descriptor: int = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
            if below is not None:
                number = os.fstat(descriptor).st_ino
                self._files[descriptor] = (below, number)
                if new:
                    self._keep("create", below, file=number)
                elif flags & os.O_TRUNC:
                    self._keep("resize", below, file=number)
            return descriptor

    def _close(self, descriptor: int) -> None:
        with self._mutex:
            self._files.pop(descriptor, None)
            _REAL["close"](descriptor)

    def _written(self, descriptor: int, offset: int, data: bytes) -> None:
        if descriptor in self._files and data:
            path, number = self._files[descriptor]
            self._keep("write", path, file=number, offset=offset, data=data)

    def _write(self, descriptor: int, data: Any) -> int:
        with self._mutex:
            tracked = descriptor in self._files
            offset = os.lseek(descriptor, 0, os.SEEK_CUR) if tracked else 0
            count: int = _REAL["write"](descriptor, data)
            if tracked:
                self._written(descriptor, offset, bytes(memoryview(data).cast("B")[:count]))
            return count

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self._pwritev(descriptor, [data], offset)

    def _pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        with self._mutex:
            count: int = _REAL["pwritev"](descriptor, buffers, offset, flags)
            self._written(descriptor, offset, b"".join(buffers)[:count])
            return count

    def _ftruncate(self, descriptor: int, nbytes: int) -> None:
        with self._mutex:
            _REAL["ftruncate"](descriptor, nbytes)
            self._resized(descriptor, nbytes)

    def _posix_fallocate(self, descriptor: int, offset: int, nbytes: int) -> None:
        with self._mutex:
            _REAL["posix_fallocate"](descriptor, offset, nbytes)
            self._resized(descriptor, os.fstat(descriptor).st_size)

    def _resized(self, descriptor: int, nbytes: int) -> None:
        if descriptor in self._files:
            path, number = self._files[descriptor]
            self._keep("resize", path, file=number, offset=nbytes)

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with self._mutex:
            _REAL["fsync"](number)
            if number in self._files:
                path, file = self._files[number]
                if os.path.isdir(f"{self._root}/{path}"):  # noqa: PTH112
                    self._keep("sync_folder", path)
                else:
                    self._keep("sync_file", path, file=file)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._named("make_folder", _REAL["mkdir"], path, mode, dir_fd=dir_fd)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._named("unlink", _REAL["rmdir"], path, dir_fd=dir_fd)

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._named("unlink", _REAL["unlink"], path, dir_fd=dir_fd)

    def _sendfile(self, target: int, source: int, offset: int, count: int) -> int:
        if target in self._files:
            # Makes callers fall back to `write`, which is recorded.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sent: int = _REAL["sendfile"](target, source, offset, count)
        return sent

    def _named(
        self, verb: Verb, do: Callable[..., Any], path: Any, *more: Any, dir_fd: int | None
    ) -> None:
        below = self._below(path, dir_fd)
        with self._mutex:
            do(path, *more, dir_fd=dir_fd)
            if below:
                self._keep(verb, below)

    def _rename(self, source: Any, target: Any, **folders: Any) -> None:
        old, new = self._below(source), self._below(target)
        with self._mutex:
            _REAL["rename"](source, target, **folders)
            if old is not None and new is not None:
                self._keep("rename", old, target=new)

    def _rename_exclusive(self, source: str, target: str) -> None:
        """Replace `renaming.rename_exclusive`, which calls the C library."""
        with self._mutex:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            self._rename(source, target)

    def open_file(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """Replace `open`: a file below the root that is opened for writing records its writes."""
        if not set("wax+") & set(mode) or self._below(file) is None:
            return _REAL_OPEN(file, mode, *arguments, **options)
        raw = _RecordedFile(self, file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        encoding, newline = options.get("encoding"), options.get("newline")
        return io.TextIOWrapper(buffered, encoding or "utf-8", newline=newline)


class _RecordedFile(io.FileIO):
    """An open file whose writes are recorded."""

    def __init__(self, recorder: _Recorder, file: Any, mode: str) -> None:
        self._recorder = recorder
        super().__init__(file, mode, opener=lambda path, flags: recorder._open(path, flags, 0o666))

    def write(self, data: Any) -> int:
        with self._recorder._mutex:
            offset = self.tell()
            count = super().write(data) or 0
            view = memoryview(data).cast("B")
            self._recorder._written(self.fileno(), offset, bytes(view[:count]))
            return count

    def truncate(self, size: int | None = None) -> int:
        with self._recorder._mutex:
            nbytes = super().truncate(size)
            self._recorder._resized(self.fileno(), nbytes)
            return nbytes

    def close(self) -> None:
        if not self.closed:
            with self._recorder._mutex:
                self._recorder._files.pop(self.fileno(), None)
                super().close()
