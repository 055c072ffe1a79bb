"""Skills for the tests, and disks on which the process or the power fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from holdfast.skills.bundle import Skill
from holdfast.skills.copies import STATE
from holdfast.skills.disk import Disk

V1, V2 = "1.0.0", "2.0.0"


def skill(name: str, text: str = "one", **more: str) -> Skill:
    """Returns a skill with an entry page and a reference."""
    entry = f"---\nname: {name}\ndescription: For tests.\n---\n{text}\n"
    files = {"SKILL.md": entry, "references/a.md": f"reference {text}\n", **more}
    return Skill(name, {file: content.encode() for file, content in files.items()})


def bundle(**texts: str) -> dict[str, Skill]:
    """Returns skills by name, each with its text."""
    return {name: skill(name, text) for name, text in texts.items()}


def files_in(folder: Path) -> dict[str, bytes]:
    """Returns every file below a folder, without the records of the sync."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and STATE not in path.parts and path.name != ".holdfast-skill.json"
    }


class CutError(BaseException):
    """The process was killed, or the power failed."""


class CutDisk(Disk):
    """A disk that calls `at_cut` before its n-th operation. A write or removal is half done."""

    def __init__(self, cut: int, at_cut: Callable[[], None], *, exchanges: bool = True) -> None:
        self.operations = 0
        self._cut, self._at_cut, self._exchanges = cut, at_cut, exchanges

    def _step(self) -> None:
        self.operations += 1
        if self.operations == self._cut:
            self._at_cut()

    def make_folder(self, path: Path) -> None:
        self._step()
        super().make_folder(path)

    def write(self, path: Path, data: bytes) -> None:
        if self.operations + 1 == self._cut:
            path.write_bytes(data[: len(data) // 2])
        self._step()
        path.unlink(missing_ok=True)
        super().write(path, data)

    def copy(self, source: Path, target: Path) -> None:
        self._step()
        super().copy(source, target)

    def sync_folder(self, path: Path) -> None:
        self._step()
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def exchange(self, a: Path, b: Path) -> bool:
        if not self._exchanges:
            return False
        self._step()
        return super().exchange(a, b)

    def remove(self, path: Path) -> None:
        if self.operations + 1 == self._cut:
            for file in [found for found in sorted(path.rglob("*")) if found.is_file()][::2]:
                file.unlink()
        self._step()
        super().remove(path)


class ForgetfulDisk(CutDisk):
    """A disk whose power fails before its n-th operation.

    Afterwards, each operation that no `sync_folder` has made durable may be lost.
    """

    def __init__(self, cut: int, root: Path, *, exchanges: bool = True) -> None:
        super().__init__(cut, self._go_out, exchanges=exchanges)
        self._root, self._before = root, root.with_name("before")
        shutil.copytree(root, self._before, symlinks=True)
        self._done: list[tuple[Callable[[Disk, Path], None], set[Path]]] = []

    def _go_out(self) -> None:
        raise CutError

    def survivor(self, random: Random) -> None:
        """Replace the folder by one of the states that the power failure can leave."""
        shutil.rmtree(self._root)
        self._before.rename(self._root)
        for operation, waits_for in self._done:
            if not waits_for or random.random() < 0.5:
                with _lost():
                    operation(Disk(), self._root)

    def _note(self, operation: Callable[[Disk, Path], None], *folders: Path) -> None:
        self._done.append((operation, {*folders}))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        below = path.relative_to(self._root)
        self._note(lambda disk, root: disk.make_folder(root / below), path.parent)

    def write(self, path: Path, data: bytes) -> None:
        super().write(path, data)
        below = path.relative_to(self._root)
        self._note(lambda disk, root: disk.write(root / below, data), path.parent)

    def copy(self, source: Path, target: Path) -> None:
        self.write(target, source.read_bytes())

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        for _, waits_for in self._done:
            waits_for.discard(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        a, b = source.relative_to(self._root), target.relative_to(self._root)
        # A rename is one transaction: once the new name is durable, the old one is gone.
        self._note(lambda disk, root: disk.rename(root / a, root / b), target.parent)

    def exchange(self, a: Path, b: Path) -> bool:
        if not super().exchange(a, b):
            return False
        below = a.relative_to(self._root), b.relative_to(self._root)

        def again(disk: Disk, root: Path) -> None:
            disk.exchange(root / below[0], root / below[1])

        self._note(again, a.parent, b.parent)
        return True

    def remove(self, path: Path) -> None:
        super().remove(path)
        below = path.relative_to(self._root)
        self._note(lambda disk, root: disk.remove(root / below), path.parent)


@contextmanager
def _lost() -> Iterator[None]:
    """Ignore an operation on a file or folder that was lost."""
    try:
        yield
    except OSError:
        return
