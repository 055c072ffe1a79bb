"""A user's folder of skills: the copies in it, and what is written down about them.

    NAME/                        a copy, with its receipt
    .holdfast-skills/ledger.json names that were offered, names that were removed
    .holdfast-skills/synced      version of the newest full sync: one read tells that all is done
    .holdfast-skills/lock        who is at work
    .holdfast-skills/kept-*      archives of what gave way
    .holdfast-skills/stage-*     a copy on its way, or what a killed process left
    .holdfast-skills/write-*     a file on its way, likewise

Order of writes: a copy is durable under `stage-*` before it trades places with the one it replaces;
that trade is durable before what was replaced goes.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from holdfast.errors import ExistsError, HoldfastError, StorageError
from holdfast.skills.bundle import ENTRY, Skill
from holdfast.skills.content import RECEIPT, Digests, digests_in
from holdfast.skills.disk import Disk
from holdfast.skills.records import Ledger, SyncRecord, decode_ledger, decode_receipt, order_of

STATE = ".holdfast-skills"


class Copies:
    """The copies below one folder."""

    def __init__(self, root: Path, *, categories: bool = False, disk: Disk | None = None) -> None:
        """`categories`: a copy may also lie one folder deeper, where its user has moved it."""
        self.root, self.state = root, root / STATE
        self._categories, self._disk = categories, disk or Disk()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether this process may write, until the context ends. Makes the folders, and puts in
        order what a killed process left."""
        with _said(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._disk.make_folder(self.state)
                self._disk.sync_folder(self.root)
            with self._disk.lock(self.state / "lock") as mine:
                if mine:
                    self.ledger()  # Unreadable, it stops everything before a byte is written.
                    self._recover()
                yield mine

    # ---------------------------------------------------------------------------------- to read

    def place(self, name: str) -> Path:
        """Where the copy of a skill is, or would be."""
        place = self.root / name
        if self._categories and not _is_there(place):
            with suppress(OSError):
                inside = sorted(self.root.glob(f"[!.]*/{name}/{ENTRY}"))
                return inside[0].parent if inside else place
        return place

    def receipt(self, name: str) -> SyncRecord | None:
        """Of the copy of a skill; None where there is none that can be read."""
        place = self.place(name)
        try:
            return None if place.is_symlink() else decode_receipt((place / RECEIPT).read_bytes())
        except OSError:
            return None

    def held(self, name: str) -> Digests | None:
        """What the copy of a skill holds; None where nothing is there, empty where a file or a link
        is in its place."""
        place = self.place(name)
        if not _is_there(place):
            return None
        if place.is_symlink() or not place.is_dir():
            return {}
        return digests_in(place)

    def ledger(self) -> Ledger:
        """Which names were offered.

        Raises:
            StorageError, FormatError: it is there and cannot be read. It is never taken for empty.
        """
        path = self.state / "ledger.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return Ledger()
        except OSError as error:
            raise StorageError(f"cannot read `{path}`: {error.strerror}") from error
        return decode_ledger(data, where=str(path))

    def synced(self) -> str:
        """The version of the newest full sync; empty before the first."""
        try:
            return (self.state / "synced").read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    # --------------------------------------------------------------------------------- to write

    def write_ledger(self, ledger: Ledger) -> None:
        """Keep which names were offered, if that has changed."""
        if ledger != self.ledger():
            self._replace(self.state / "ledger.json", ledger.encode())

    def write_synced(self, version: str) -> None:
        """Note that all is done as this version would, if a later one has not noted that."""
        if order_of(version) > order_of(self.synced()):
            self._replace(self.state / "synced", version.encode())

    def write_receipt(self, name: str, receipt: SyncRecord) -> None:
        """Give a copy that is as it should be the receipt that says so."""
        self._replace(self.place(name) / RECEIPT, receipt.encode())

    def put(self, skill: Skill, version: str) -> None:
        """Put a whole copy of a skill into its place, at one instant. Files there that were never
        shipped go along.

        Raises:
            ExistsError: the copy there was changed in the meantime; it stays.
            StorageError: the disk failed; what was there stays.
        """
        place = self.place(skill.name)
        with _said(place):
            before = self.held(skill.name)
            receipt = self.receipt(skill.name)
            mine = skill.files.keys() | (receipt.files.keys() if receipt else set())
            theirs = [file for file in before or () if file not in mine]
            stage = self._stage(skill, version, place, theirs)
            new = stage / "new"
            if before is None:
                self._disk.rename(new, place)
            else:
                old = self._trade(new, place, stage)
                if digests_in(old) != before:
                    self._trade(place, old, stage)
                    self._remove_stage(stage, place)
                    raise ExistsError(f"`{place}` was changed during the sync", hint="sync again")
            self._remove_stage(stage, place)

    def remove(self, name: str) -> None:
        """Take a copy away, at one instant."""
        place = self.place(name)
        with _said(place):
            stage = self._new_stage(place)
            self._disk.rename(place, stage / "gone")
            self._remove_stage(stage, place)

    def keep(self, folder: Path, name: str) -> Path:
        """Archive a folder, so that nothing in it is lost. Returns where."""
        buffer = io.BytesIO()
        with _said(folder), tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.add(folder, name)
        kept = self.state / f"kept-{name}-{secrets.token_hex(4)}.tar.gz"
        self._replace(kept, buffer.getvalue())
        return kept

    def _stage(self, skill: Skill, version: str, place: Path, theirs: list[str]) -> Path:
        """A whole copy, durable, aside."""
        stage = self._new_stage(place)
        new = stage / "new"
        files = [*skill.files, *theirs]
        # Sorted, a folder comes before those in it.
        folders = sorted({new / above for file in files for above in PurePosixPath(file).parents})
        try:
            for folder in folders:
                self._disk.make_folder(folder)
            for file in files:
                if file in skill.files:
                    self._disk.write(new / file, skill.files[file])
                else:
                    self._disk.copy(place / file, new / file)
            self._disk.write(new / RECEIPT, SyncRecord(version, skill.digests).encode())
            for folder in (*folders, stage, self.state):
                self._disk.sync_folder(folder)
            staged = digests_in(new)
            if {file: staged.get(file) for file in skill.files} != skill.digests:
                raise StorageError(f"`{new}` does not hold what was written to it")
        except (OSError, HoldfastError):
            with suppress(OSError):
                self._disk.remove(stage)
            raise
        return stage

    def _new_stage(self, place: Path) -> Path:
        stage = self.state / f"stage-{place.name}-{secrets.token_hex(4)}"
        self._disk.make_folder(stage)
        self._disk.write(stage / "for", str(place.relative_to(self.root)).encode())
        return stage

    def _trade(self, one: Path, place: Path, stage: Path) -> Path:
        """`one` takes its place. Returns where what was there is now."""
        if self._disk.exchange(one, place):
            return one
        # Two steps, and an instant without a copy: should the process die in it, `_recover` puts
        # the old one back.
        old = stage / "old"
        self._disk.rename(place, old)
        self._disk.rename(one, place)
        return old

    def _remove_stage(self, stage: Path, place: Path) -> None:
        for folder in (place.parent, stage):
            self._disk.sync_folder(folder)
        self._disk.remove(stage)

    def _recover(self) -> None:
        """Finish what a killed process had begun: every copy is the old or the new one already, or
        the old one is put back; nothing that is not known from elsewhere is deleted."""
        for unfinished in self.state.glob("write-*"):
            unfinished.unlink()
        for stage in sorted(self.state.glob("stage-*")):
            name = stage.name.removeprefix("stage-").rpartition("-")[0]
            old, place = stage / "old", self.root / _read(stage / "for", name)
            if old.is_dir() and not _is_there(place):
                self._disk.rename(old, place)
                self._disk.sync_folder(place.parent)
            for left in (stage / "new", old, stage / "gone"):
                if left.is_dir() and not _accounted_for(left, place):
                    self.keep(left, name)
            self._disk.remove(stage)

    def _replace(self, path: Path, data: bytes) -> None:
        """A small file in place of the one there, at one instant; durable on return."""
        write = self.state / f"write-{secrets.token_hex(4)}"
        with _said(path):
            self._disk.write(write, data)
            self._disk.rename(write, path)
            self._disk.sync_folder(path.parent)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _read(path: Path, default: str) -> str:
    try:
        return path.read_text() or default
    except (OSError, UnicodeDecodeError):
        return default


def _accounted_for(left: Path, place: Path) -> bool:
    """Whether every file here was shipped, or is in the copy in place. Without a receipt it is a
    copy that was never whole, of files that are elsewhere."""
    try:
        receipt = decode_receipt((left / RECEIPT).read_bytes())
    except OSError:
        return True
    try:
        held = digests_in(left)
        there = digests_in(place) if place.is_dir() else {}
    except HoldfastError:
        return False
    shipped = receipt.files if receipt else {}
    return all(known in (shipped.get(file), there.get(file)) for file, known in held.items())


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turn what the system says into what the user needs to know."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot change `{path}`: {error.strerror or error}") from error
