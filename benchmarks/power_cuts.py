"""Model of a disk under power cuts: the states that file operations may leave behind.

A file system guarantees only what was synced: the bytes of a file once the file is synced, a name
once its folder is. After a power cut, any subset of the other operations may have taken effect, in
any order, and a write may have reached only some of its pages. A rename within one folder is
atomic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from holdfast.format.checksum import checksum

PAGE_BYTES = 4096

Verb = Literal[
    "make_folder",
    "create",
    "resize",
    "write",
    "sync_file",
    "sync_folder",
    "rename",
    "link",
    "unlink",
]


@dataclass(frozen=True, slots=True)
class Operation:
    """A change of a tree of files."""

    verb: Verb
    path: str
    """Path from the root of the tree. For `resize`, `write` and `sync_file` the path under which
    the file was opened; `file` identifies it."""

    file: int = 0
    """Number of the file, which a rename does not change."""

    offset: int = 0
    """Offset of a `write`; new size for `resize`."""

    data: bytes = b""
    target: str = ""
    """New path, for `rename` and `link`. A rename replaces a file or an empty folder."""

    def __str__(self) -> str:
        more = f" to {self.target}" * bool(self.target)
        more += f" {len(self.data)} bytes at {self.offset}" * (self.verb == "write")
        return f"{self.verb} {self.path}{more}"


Tree = Mapping[str, bytes | None]
"""Bytes of each file by path, None for a folder. A folder comes before its contents."""

Version = Literal["killed", "lost", "reordered", "torn"]
"""`killed`: the process died, and all its operations took effect. `lost`: only synced ones did.
`reordered`: a subset of the others did as well. `torn`: also parts of writes."""


@dataclass(frozen=True, slots=True)
class PowerCut:
    """One possible power cut."""

    at: int
    """Number of operations before the cut."""

    version: Version
    seed: int
    last: str = ""
    """Last operation before the cut, for display."""

    def __str__(self) -> str:
        return f"cut {self.at}, {self.version} ({self.seed}), after: {self.last}"


@dataclass(slots=True)
class _File:
    durable: bytes = b""
    pending: list[Operation] = field(default_factory=list)


@dataclass(slots=True)
class _Folder:
    entries: dict[str, _File | _Folder] = field(default_factory=dict)
    durable: dict[str, _File | _Folder] = field(default_factory=dict)
    pending: list[tuple[str, str, _File | _Folder | None]] = field(default_factory=list)
    """Changes of names, in order: `(removed, added, node)`. Either name may be empty."""


@dataclass(frozen=True, slots=True)
class _Fate:
    """Effect of operations that were not synced."""

    name: Callable[[], bool]
    """Whether the next change of a name takes effect."""

    data: Callable[[Operation, bytearray], None]
    """Function that applies the surviving part of an operation to the bytes of a file."""


class SimulatedDisk:
    """A tree of files, and the part of it that is durable."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._files: dict[int, _File] = {}

    def apply(self, operation: Operation) -> None:
        """Apply an operation."""
        verb, path = operation.verb, operation.path
        if verb in ("resize", "write"):
            self._files[operation.file].pending.append(operation)
        elif verb == "sync_file":
            file = self._files[operation.file]
            file.durable, file.pending = _content(file, _EVERYTHING), []
        elif verb == "sync_folder":
            folder = self._folder(path)
            folder.durable, folder.pending = dict(folder.entries), []
        elif verb == "rename":
            self._rename(path, operation.target)
        elif verb == "link":
            self._link(path, operation.target)
        else:
            folder, name = self._above(path)
            if verb == "unlink":
                del folder.entries[name]
                folder.pending.append((name, "", None))
            else:
                node: _File | _Folder = _Folder()
                if verb == "create":
                    node = self._files[operation.file] = _File()
                folder.entries[name] = node
                folder.pending.append(("", name, node))

    def settle(self) -> None:
        """Make everything durable."""
        self._settle(self._root)

    def survivors(self, version: Version, seed: int) -> Tree:
        """Return a tree that a power cut now may leave, chosen by `seed`."""
        return dict(_tree(self._root, "", _fate(version, seed)))

    def _settle(self, folder: _Folder) -> None:
        folder.durable, folder.pending = dict(folder.entries), []
        for node in folder.entries.values():
            if isinstance(node, _Folder):
                self._settle(node)
            else:
                node.durable, node.pending = _content(node, _EVERYTHING), []

    def _rename(self, path: str, target: str) -> None:
        source_folder, source = self._above(path)
        target_folder, name = self._above(target)
        node = source_folder.entries.pop(source)
        target_folder.entries[name] = node
        if source_folder is target_folder:
            source_folder.pending.append((source, name, node))
        else:
            source_folder.pending.append((source, "", None))
            target_folder.pending.append(("", name, node))

    def _link(self, path: str, target: str) -> None:
        source_folder, source = self._above(path)
        folder, name = self._above(target)
        node = folder.entries[name] = source_folder.entries[source]
        folder.pending.append(("", name, node))

    def _folder(self, path: str) -> _Folder:
        node: _File | _Folder = self._root
        for part in filter(None, path.split("/")):
            assert isinstance(node, _Folder), path
            node = node.entries[part]
        assert isinstance(node, _Folder), path
        return node

    def _above(self, path: str) -> tuple[_Folder, str]:
        above, _, name = path.rpartition("/")
        return self._folder(above), name


def cuts(
    operations: Sequence[Operation], *, durable: int = 0, seeds: Iterable[int] = range(4)
) -> Iterator[tuple[PowerCut, Tree]]:
    """Yield the trees that a power cut after each operation may leave.

    Versions with a random choice come once per seed. The first `durable` operations make the
    initial, durable state.
    """
    disk, last = SimulatedDisk(), "nothing"
    seeds = tuple(seeds)
    for at in range(len(operations) + 1):
        if at == durable:
            disk.settle()
        if at >= durable:
            yield PowerCut(at - durable, "killed", 0, last), disk.survivors("killed", 0)
            yield PowerCut(at - durable, "lost", 0, last), disk.survivors("lost", 0)
            for version in ("reordered", "torn"):
                for seed in seeds:
                    yield PowerCut(at - durable, version, seed, last), disk.survivors(version, seed)
        if at < len(operations):
            disk.apply(operations[at])
            last = str(operations[at])


def left_by(operations: Sequence[Operation], cut: PowerCut, *, durable: int = 0) -> Tree:
    """Return the tree that one cut leaves. The first `durable` operations are durable."""
    disk = SimulatedDisk()
    for done, operation in enumerate(operations[: durable + cut.at]):
        if done == durable:
            disk.settle()
        disk.apply(operation)
    if cut.at == 0:
        disk.settle()
    return disk.survivors(cut.version, cut.seed)


def fingerprint(tree: Tree) -> int:
    """Hash the names and contents of a tree."""
    lines = (
        f"{path}\0{'folder' if data is None else f'{len(data)} {checksum(data):x}'}"
        for path, data in sorted(tree.items())
    )
    return checksum("\n".join(lines).encode(errors="surrogateescape"))


def _fate(version: Version, seed: int) -> _Fate:
    """Return the effect for a version. Seeds 0 and 1 of `reordered` are its extremes: all names and
    no data, as when a rename is written before the file; then all data and no names."""
    if version == "killed":
        return _EVERYTHING
    if version == "lost":
        return _NOTHING
    choose = Random(seed)
    if version == "torn":
        names = (lambda: True) if seed % 2 == 0 else (lambda: choose.random() < 0.5)
        return _Fate(names, lambda operation, data: _tear(operation, data, choose))
    if seed == 0:
        return _Fate(_EVERYTHING.name, _NOTHING.data)
    if seed == 1:
        return _Fate(_NOTHING.name, _EVERYTHING.data)

    def some(operation: Operation, data: bytearray) -> None:
        if choose.random() < 0.5:
            _change(operation, data)

    return _Fate(lambda: choose.random() < 0.5, some)


def _change(operation: Operation, data: bytearray) -> None:
    """Apply a `resize` or a `write` to the bytes of a file."""
    if operation.verb == "resize":
        _resize(data, operation.offset)
        return
    if operation.offset > len(data):
        _resize(data, operation.offset)
    data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _tear(operation: Operation, data: bytearray, choose: Random) -> None:
    """Apply a part of a write: its first bytes, or some of its pages."""
    if operation.verb == "resize" or not operation.data:
        _change(operation, data)
        return
    nbytes = len(operation.data)
    if choose.random() < 0.5:
        part = operation.data[: choose.randrange(nbytes)]
        _change(Operation("write", "", offset=operation.offset, data=part), data)
        return
    for start in range(0, nbytes, PAGE_BYTES):
        if choose.random() < 0.5:
            page = operation.data[start : start + PAGE_BYTES]
            _change(Operation("write", "", offset=operation.offset + start, data=page), data)


def _resize(data: bytearray, nbytes: int) -> None:
    del data[nbytes:]
    data.extend(bytes(nbytes - len(data)))


_EVERYTHING = _Fate(lambda: True, _change)
_NOTHING = _Fate(lambda: False, lambda _operation, _data: None)


def _content(file: _File, fate: _Fate) -> bytes:
    if not file.pending or fate is _NOTHING:
        return file.durable
    data = bytearray(file.durable)
    for operation in file.pending:
        fate.data(operation, data)
    return bytes(data)


def _tree(folder: _Folder, path: str, fate: _Fate) -> Iterator[tuple[str, bytes | None]]:
    entries = dict(folder.durable)
    for removed, added, node in folder.pending:
        # A rename has no effect if the creation of its source had none.
        if fate.name() and (node is None or not removed or removed in entries):
            entries.pop(removed, None)
            if node is not None:
                entries[added] = node
    for name, node in entries.items():
        where = f"{path}/{name}" if path else name
        if isinstance(node, _Folder):
            yield where, None
            yield from _tree(node, where, fate)
        else:
            yield where, _content(node, fate)
