"""What is left on a disk when the power goes: operations of a file system, as values, and every
state that they may leave behind.

A file system promises only what was synced: a file's bytes once the file is, a name once the folder
that holds it is. Of everything else any part may be there after a power cut, in any order, whatever
came later; a single write may be there in some of its pages. A rename in one folder is there whole
or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

PAGE_BYTES = 4096

Verb = Literal[
    "make_folder", "create", "resize", "write", "sync_file", "sync_folder", "rename", "unlink"
]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that was done to a tree of files."""

    verb: Verb
    path: str
    """Relative to the root of the tree. Of `resize`, `write` and `sync_file`: where the file was
    created or opened; `file` says which one is meant."""

    file: int = 0
    """Number of the file: it stays what it is when it is renamed."""

    offset: int = 0
    """Where `write` writes; the new size for `resize`."""

    data: bytes = b""
    target: str = ""
    """New path, for `rename`; what was there is replaced, unless it is a folder that holds
    something."""

    def __str__(self) -> str:
        more = f" to {self.target}" * bool(self.target)
        more += f" {len(self.data)} bytes at {self.offset}" * (self.verb == "write")
        return f"{self.verb} {self.path}{more}"


Tree = Mapping[str, bytes | None]
"""Path to the bytes of a file, None for a folder; a folder stands before what is in it."""

Version = Literal["killed", "lost", "reordered", "torn"]
"""`killed`: the process died, and all that it did is there. `lost`: nothing but what was synced.
`reordered`: any part of the rest. `torn`: any part, writes in some of their pages."""


@dataclass(frozen=True, slots=True)
class PowerCut:
    """One way in which the power goes."""

    at: int
    """How many operations were done."""

    version: Version
    seed: int
    last: str = ""
    """The last of them, for people."""

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
    """Names that came (with what they name) and names that went, in order: `(gone, new, node)`,
    either name may be empty."""


@dataclass(frozen=True, slots=True)
class _Fate:
    """What becomes of an operation that was not synced."""

    name: Callable[[], bool]
    """Whether the next change of a name is there."""

    data: Callable[[Operation, bytearray], None]
    """Does to a file's bytes what is there of the next change to them."""


class SimulatedDisk:
    """A tree of files as the operations make it, and what is durable of it."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._files: dict[int, _File] = {}

    def apply(self, operation: Operation) -> None:
        """Do one more operation."""
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
        """Let everything that was done be durable."""
        self._settle(self._root)

    def survivors(self, version: Version, seed: int) -> Tree:
        """What a power cut now leaves; `seed` chooses among the states that a version can leave."""
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
    """What is left when the power goes after each of the operations, in every version, the chosen
    ones once for each seed. The first `durable` operations are what was there before."""
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
    """What one cut leaves; the first `durable` operations are what was there before."""
    disk = SimulatedDisk()
    for done, operation in enumerate(operations[: durable + cut.at]):
        if done == durable:
            disk.settle()
        disk.apply(operation)
    if cut.at == 0:
        disk.settle()
    return disk.survivors(cut.version, cut.seed)


def _fate(version: Version, seed: int) -> _Fate:
    """Seeds 0 and 1 of the chosen versions are their extremes: every name and no data, as when a
    rename overtakes what it names; then all data and no name."""
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
    """Do to the bytes what a `resize` or a `write` does."""
    if operation.verb == "resize":
        _resize(data, operation.offset)
        return
    if operation.offset > len(data):
        _resize(data, operation.offset)
    data[operation.offset : operation.offset + len(operation.data)] = operation.data


def _tear(operation: Operation, data: bytearray, choose: Random) -> None:
    """A part of a write: what stands before some byte, or some of its pages."""
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
    for gone, new, node in folder.pending:
        # What is to be renamed may itself have come and not be there.
        if fate.name() and (node is None or not gone or gone in entries):
            entries.pop(gone, None)
            if node is not None:
                entries[new] = node
    for name, node in entries.items():
        where = f"{path}/{name}" if path else name
        if isinstance(node, _Folder):
            yield where, None
            yield from _tree(node, where, fate)
        else:
            yield where, _content(node, fate)
