"""Remembers which checkpoints are complete, so that retention need not open all after each save."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from holdfast.catalog.open_any import open_any
from holdfast.catalog.seal import is_sealed, open_sealed
from holdfast.errors import HoldfastError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest
from holdfast.format.names import INDEX_FILES
from holdfast.format.seal import SEAL
from holdfast.storage.store import ReadStore

LOOKS_MAX = 256
"""Largest number of files that are checked again after a save. A run of 2,048 ranks that keeps 10
checkpoints has 20,480 files, and on a network file system each check is a request to the server."""

_TAIL_BYTES = 1 << 20
"""Number of bytes at the end of a file that its checksum covers, if the file is not a data file."""


@dataclass(slots=True)
class _Complete:
    """A checkpoint that was found complete."""

    manifest: Manifest
    """Manifest without its entries, since there may be a million of them."""

    files: dict[str, object]
    """Size of each data file. For any other file, its size and the checksum of its last MiB."""

    unseen: list[str] = field(default_factory=list)
    """Files that the current round has still to check. A round checks each file once."""


class CompleteCheckpoints:
    """Checkpoints that a run has found complete.

    Each checkpoint is opened once. After that, each call of `look_again` checks at most `LOOKS_MAX`
    files, in rotation, so the work after a save does not grow with the number of checkpoints and
    files. In a small run, each call checks all files.
    """

    def __init__(self, store: ReadStore) -> None:
        self._store = store
        self._known: dict[str, _Complete] = {}
        """Known checkpoints by folder. The one that was checked longest ago comes first."""

        self.errors: dict[str, HoldfastError] = {}
        """Error of the last call of `manifest` for each folder for which it failed."""

    def manifest(self, folder: str) -> Manifest:
        """Return the manifest, without entries, of the checkpoint in a folder.

        Raises:
            StorageError: a file of the checkpoint cannot be read now. It may be undamaged.
            HoldfastError: the checkpoint is not complete, or an index of it is damaged.
        """
        if folder not in self._known:
            self.errors.pop(folder, None)
            try:
                self._add(folder, read_any(self._store, folder, entries=False))
            except HoldfastError as error:
                self.errors[folder] = error
                raise
        return self._known[folder].manifest

    def published(self, folder: str) -> None:
        """Add a checkpoint that this run has just published, or published again. Read only the
        index of the checkpoint, since each rank has confirmed that its own data file is complete.
        """
        self._known.pop(folder, None)
        self._add(folder, read_any(self._store, folder, entries=False, check_files=False))

    def look_again(self, folders: Collection[str]) -> None:
        """Check up to `LOOKS_MAX` files of known checkpoints. Forget each checkpoint that has a
        changed file, or is not in `folders`."""
        for folder in self._known.keys() - folders:
            del self._known[folder]
        for folder in self.errors.keys() - folders:
            del self.errors[folder]
        left = LOOKS_MAX
        for folder, known in [*self._known.items()]:
            files = known.unseen or [*known.files]
            seen, known.unseen = files[:left], files[left:]
            left -= len(seen)
            del self._known[folder]
            if all(self._is_unchanged(folder, file, known.files[file]) for file in seen):
                self._known[folder] = known
            if not left:
                break

    def _add(self, folder: str, manifest: Manifest) -> None:
        others = {name for name in self._store.list(folder) if not name.endswith("/")}
        if indices := others & {*INDEX_FILES, SEAL}:
            # Leave out files of the user: if they cannot be read, the checkpoint still can.
            others = indices
        files = {name: self._ending(folder, name) for name in others - manifest.files.keys()}
        self._known[folder] = _Complete(manifest, {**manifest.files, **files})

    def _is_unchanged(self, folder: str, file: str, expected: object) -> bool:
        try:
            if isinstance(expected, int):
                return self._store.size(f"{folder}/{file}") == expected
            return self._ending(folder, file) == expected
        except HoldfastError:
            return False

    def _ending(self, folder: str, file: str) -> object:
        """Return the size of a file, and the checksum of its last MiB."""
        nbytes = self._store.size(f"{folder}/{file}")
        tail = self._store.read(f"{folder}/{file}", max(0, nbytes - _TAIL_BYTES), nbytes)
        return nbytes, checksum(tail)


def read_any(
    store: ReadStore, folder: str, *, entries: bool = True, check_files: bool = True
) -> Manifest:
    """Return the manifest of a checkpoint of a run, or of the Hugging Face folder that a run may
    save in place of its last checkpoint. `entries`: whether to read the entries too. `check_files`:
    whether to check that all files are complete."""
    if not entries and is_sealed(store, folder):
        return open_sealed(store, folder)
    return open_any(store, folder, check_files=check_files, entries=entries).manifest
