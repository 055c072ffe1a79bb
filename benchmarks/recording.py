"""Record the file operations of Python code without a `Store`, such as other libraries."""

from __future__ import annotations

import _pyio  # type: ignore[import-not-found]
import builtins
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.power_cuts import Operation, SimulatedDisk, Tree, Verb
from holdfast.storage import renaming

Timed = tuple[int, Operation]
"""Time in nanoseconds, on a clock that all processes of the machine share, and operation."""


@contextmanager
def recorded_folder(folder: str | os.PathLike[str]) -> Iterator[list[Timed]]:
    """Record the operations of this process on files below `folder` through `open` and `os`.

    Does not see operations of native code. To show that there were none, compare `tree_after` the
    operations with `tree_at` the folder.
    """
    recorder = _Recorder(os.path.realpath(folder))
    hooks = list(recorder.hooks())
    real = [(module, name, getattr(module, name)) for module, name, _ in hooks]
    try:
        for module, name, hook in hooks:
            setattr(module, name, hook)
        yield recorder.operations
    finally:
        for module, name, function in real:
            setattr(module, name, function)


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


_HOOKED = (
    "open",
    "close",
    "write",
    "pwrite",
    "pwritev",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "mkdir",
    "rmdir",
    "unlink",
    "remove",
    "rename",
    "replace",
    "link",
    "sendfile",
)
_REAL: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _HOOKED}
_REAL_OPEN = io.open


class _Recorder:
    """Replacements for functions of `os` and for `open`."""

    def __init__(self, root: str) -> None:
        self.operations: list[Timed] = []
        self._root = root
        self._files: dict[int, tuple[str, int]] = {}
        """Path and inode of each open file below the root, by descriptor."""

        self._mutex = threading.RLock()

    def hooks(self) -> Iterator[tuple[Any, str, Any]]:
        """Yield each module, the name of its function, and the replacement."""
        yield os, "open", self._open
        yield os, "close", self._close
        yield os, "write", self._write
        yield os, "pwrite", lambda descriptor, data, at: self._pwritev(descriptor, [data], at)
        yield os, "pwritev", self._pwritev
        yield os, "sendfile", self._sendfile
        for name in ("ftruncate", "posix_fallocate"):
            yield os, name, partial(self._resize, name)
        for name in ("fsync", "fdatasync"):
            yield os, name, partial(self._sync, name)
        for name in ("rename", "replace"):
            yield os, name, partial(self._rename, name)
        yield os, "link", self._link
        yield os, "mkdir", partial(self._change_name, "mkdir", "make_folder")
        for name in ("rmdir", "unlink", "remove"):
            yield os, name, partial(self._change_name, name, "unlink")
        yield renaming, "rename_exclusive", self._rename_exclusive
        for module in (builtins, io):
            yield module, "open", self._open_file

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

    def _pwritev(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        with self._mutex:
            count: int = _REAL["pwritev"](descriptor, buffers, offset, flags)
            self._written(descriptor, offset, b"".join(buffers)[:count])
            return count

    def _resize(self, name: str, descriptor: int, *numbers: int) -> None:
        with self._mutex:
            _REAL[name](descriptor, *numbers)
            if descriptor in self._files:
                path, number = self._files[descriptor]
                nbytes = os.fstat(descriptor).st_size
                self._keep("resize", path, file=number, offset=nbytes)

    def _link(self, source: Any, target: Any, *, follow_symlinks: bool = True) -> None:
        old, new = self._below(source), self._below(target)
        with self._mutex:
            _REAL["link"](source, target, follow_symlinks=follow_symlinks)
            if old is not None and new is not None:
                self._keep("link", old, target=new)

    def _sync(self, name: str, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        with self._mutex:
            _REAL[name](descriptor)
            if descriptor in self._files:
                path, number = self._files[descriptor]
                is_folder = os.path.isdir(f"{self._root}/{path}")  # noqa: PTH112
                self._keep("sync_folder" if is_folder else "sync_file", path, file=number)

    def _sendfile(self, target: int, source: int, offset: int, count: int) -> int:
        if target in self._files:
            # Makes callers fall back to `write`, which is recorded.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sent: int = _REAL["sendfile"](target, source, offset, count)
        return sent

    def _change_name(
        self, name: str, verb: Verb, path: Any, *more: Any, dir_fd: int | None = None
    ) -> None:
        below = self._below(path, dir_fd)
        with self._mutex:
            _REAL[name](path, *more, dir_fd=dir_fd)
            if below:
                self._keep(verb, below)

    def _rename(self, name: str, source: Any, target: Any, **folders: Any) -> None:
        old, new = self._below(source), self._below(target)
        with self._mutex:
            _REAL[name](source, target, **folders)
            if old is not None and new is not None:
                self._keep("rename", old, target=new)

    def _rename_exclusive(self, source: str, target: str) -> None:
        """Replace `renaming.rename_exclusive`, which calls the C library."""
        with self._mutex:
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
            self._rename("rename", source, target)

    def _open_file(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """Replace `open`. A file below the root that is opened for writing is a `FileIO` in Python,
        which writes through the functions of `os`, under the usual buffer."""
        if not set("wax+") & set(mode) or self._below(file) is None:
            return _REAL_OPEN(file, mode, *arguments, **options)
        raw = _pyio.FileIO(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        encoding, newline = options.get("encoding"), options.get("newline")
        return io.TextIOWrapper(buffered, encoding or "utf-8", newline=newline)
