"""Manage a user's folder of skills: the copies of skills in it, and the records about them.

    NAME/                        a copy, with its receipt
    .holdfast-skills/ledger.json names of skills that were installed or removed
    .holdfast-skills/synced      version of the newest full sync, checked when a command starts
    .holdfast-skills/lock        locked by the process that changes the folder
    .holdfast-skills/kept-*      archives of copies that were replaced or removed
    .holdfast-skills/stage-*     a copy in progress, or the remains of one after a kill
    .holdfast-skills/write-*     a file in progress, or the remains of one

A new copy is durable in `stage-*` before it exchanges names with the old copy. The exchange is
durable before the old copy is deleted.
"""

from __future__ import annotations

import io
import os
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from holdfast.errors import ExistsError, HoldfastError, StorageError
from holdfast.skills.bundle import ENTRY, Skill
from holdfast.skills.disk import Disk
from holdfast.skills.records import (
    RECEIPT,
    Digests,
    Ledger,
    SyncRecord,
    decode_ledger,
    decode_receipt,
    digests_in,
    order_of,
)
from holdfast.storage.locks import lock_file

STATE = ".holdfast-skills"


class Copies:
    """Copies of skills in one folder."""

    def __init__(self, root: Path, *, categories: bool = False, disk: Disk | None = None) -> None:
        """`root`: folder of skills. `categories`: whether the user may have moved copies into
        subfolders. `disk`: replaced in tests."""
        self.root: Path = root
        self.state: Path = root / STATE
        self._categories, self._disk = categories, disk or Disk()

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Context in which the folder of skills is locked. It yields False if another process has
        locked the folder, else True.

        Make the folder if it does not exist, and clean up after a killed process.
        """
        with _explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._disk.make_folder(self.state)
                self._disk.sync_folder(self.root)
            lock = lock_file(os.fspath(self.state / "lock"))
            if lock is None:
                yield False
                return
            try:
                self.ledger()  # Raises an error for a damaged ledger, before anything is changed.
                self._recover()
                yield True
            finally:
                lock.release()

    def folder(self, name: str) -> Path:
        """Return the path of a skill's copy, even if the copy does not exist."""
        folder = self.root / name
        if self._categories and not os.path.lexists(folder):
            with suppress(OSError):
                for entry in sorted(self.root.glob(f"[!.]*/{name}/{ENTRY}")):
                    return entry.parent
        return folder

    def receipt(self, name: str) -> SyncRecord | None:
        """Return the receipt in a skill's copy, which lists the files that a sync has installed.
        Return None if the receipt is missing or damaged."""
        folder = self.folder(name)
        try:
            return None if folder.is_symlink() else decode_receipt((folder / RECEIPT).read_bytes())
        except OSError:
            return None

    def digests(self, name: str) -> Digests | None:
        """Return the SHA-256 of each file in a skill's copy; None if there is no copy.

        The result is empty if there is a file or a link in place of the copy.
        """
        folder = self.folder(name)
        if not os.path.lexists(folder):
            return None
        return digests_in(folder) if folder.is_dir() and not folder.is_symlink() else {}

    def ledger(self) -> Ledger:
        """Read the record of installed and removed skills. It is empty if there is no file.

        Raises:
            StorageError, FormatError: the file cannot be read, or is damaged.
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
        """Return the newest version of Holdfast that has synced all skills; empty if none has."""
        try:
            return (self.state / "synced").read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    def write_ledger(self, ledger: Ledger) -> None:
        """Write the ledger, the record of installed and removed skills, if it has changed."""
        if ledger != self.ledger():
            self._replace(self.state / "ledger.json", ledger.encode())

    def write_synced(self, version: str) -> None:
        """Record that this version of Holdfast has synced all skills, unless a later one has."""
        if order_of(version) > order_of(self.synced()):
            self._replace(self.state / "synced", version.encode())

    def write_receipt(self, skill: Skill, version: str) -> None:
        """Write the receipt, which lists the installed files, into a copy that has no correct one.
        The copy must equal the shipped skill."""
        receipt = SyncRecord(version, skill.digests)
        self._replace(self.folder(skill.name) / RECEIPT, receipt.encode())

    def install(self, skill: Skill, version: str) -> None:
        """Replace a skill's copy by the shipped files, atomically. The user's own files stay.

        Raises:
            ExistsError: the user changed the copy in the meantime; the changed copy stays.
            StorageError: the disk failed; the old copy stays.
        """
        folder = self.folder(skill.name)
        with _explained(folder):
            before, receipt = self.digests(skill.name), self.receipt(skill.name)
            shipped = skill.files.keys() | (receipt.files.keys() if receipt else set())
            users_files = [file for file in before or () if file not in shipped]
            stage = self._staged(skill, version, folder, users_files)
            if before is None:
                self._disk.rename(stage / "new", folder)
            else:
                old = self._swap_in(stage / "new", folder, stage)
                if digests_in(old) != before:
                    self._swap_in(old, folder, stage)
                    self._remove_stage(stage, folder)
                    raise ExistsError(f"`{folder}` was changed during the sync", hint="sync again")
            self._remove_stage(stage, folder)

    def remove(self, name: str) -> None:
        """Delete a skill's copy, atomically. Do nothing if there is no copy."""
        folder = self.folder(name)
        if not os.path.lexists(folder):
            return
        with _explained(folder):
            stage = self._new_stage(name)
            self._disk.rename(folder, stage / "gone")
            self._remove_stage(stage, folder)

    def archive(self, folder: Path, name: str) -> Path:
        """Archive `folder`, a copy of skill `name`, with all its files. Return the archive path."""
        buffer = io.BytesIO()
        with _explained(folder), tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            archive.add(folder, name)
        path = self.state / f"kept-{name}-{secrets.token_hex(4)}.tar.gz"
        self._replace(path, buffer.getvalue())
        return path

    def _staged(self, skill: Skill, version: str, folder: Path, users_files: list[str]) -> Path:
        """Write a new copy of a skill, durably, to `new` in a new temporary folder.

        Return the temporary folder. `folder`: current copy, from which to take `users_files`.
        """
        stage = self._new_stage(skill.name)
        new = stage / "new"
        # Sorted, so that each folder is made before its subfolders.
        paths = map(PurePosixPath, (*skill.files, *users_files))
        folders = sorted({new / above for path in paths for above in path.parents})
        try:
            for made in folders:
                self._disk.make_folder(made)
            for file, data in skill.files.items():
                self._disk.write(new / file, data)
            for file in users_files:
                self._disk.copy(folder / file, new / file)
            self._disk.write(new / RECEIPT, SyncRecord(version, skill.digests).encode())
            for made in (*folders, stage, self.state):
                self._disk.sync_folder(made)
            if not skill.digests.items() <= digests_in(new).items():
                raise StorageError(f"`{new}` does not hold what was written to it")
        except (OSError, HoldfastError):
            with suppress(OSError):
                self._disk.remove(stage)
            raise
        return stage

    def _new_stage(self, name: str) -> Path:
        stage = self.state / f"stage-{name}-{secrets.token_hex(4)}"
        self._disk.make_folder(stage)
        return stage

    def _swap_in(self, copy: Path, folder: Path, stage: Path) -> Path:
        """Rename `copy`, a folder in `stage`, to `folder`.

        Return the new path of the copy that had the name `folder` before. It is now in `stage`.
        """
        if self._disk.exchange(copy, folder):
            return copy
        # Without an exchange, rename twice. If the process dies in between, `_recover` renames the
        # old copy back.
        aside = stage / ("old" if copy.name == "new" else "new")
        self._disk.rename(folder, aside)
        self._disk.rename(copy, folder)
        return aside

    def _remove_stage(self, stage: Path, folder: Path) -> None:
        """Make the renames between `stage` and `folder` durable. Then delete `stage`."""
        for changed in (folder.parent, stage):
            self._disk.sync_folder(changed)
        self._disk.remove(stage)

    def _recover(self) -> None:
        """Clean up after a process that was killed while it replaced or deleted a copy of a skill.

        If the new copy is not in place, rename the old copy back. Archive every other copy that has
        a receipt, since the user may have changed it at the last moment. Delete every copy that has
        none: it is incomplete, and all its files exist elsewhere.
        """
        for unfinished in self.state.glob("write-*"):
            unfinished.unlink()
        for stage in sorted(self.state.glob("stage-*")):
            name = stage.name.removeprefix("stage-").rpartition("-")[0]
            folder = self.folder(name)
            if (stage / "old").is_dir() and not os.path.lexists(folder):
                self._disk.rename(stage / "old", folder)
                self._disk.sync_folder(folder.parent)
            for left in (stage / "new", stage / "old", stage / "gone"):
                if (left / RECEIPT).is_file():
                    self.archive(left, name)
            self._disk.remove(stage)

    def _replace(self, path: Path, data: bytes) -> None:
        """Write or replace a small file, atomically and durably."""
        part = self.state / f"write-{secrets.token_hex(4)}"
        with _explained(path):
            self._disk.write(part, data)
            self._disk.rename(part, path)
            self._disk.sync_folder(path.parent)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Convert an OSError in the context to a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot change `{path}`: {error.strerror or error}") from error
