"""A run that deduplicates, on the ranks of one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Solo
from holdfast.format.manifest import Manifest
from holdfast.format.names import step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.saving.deduplicate import Deduplicator
from holdfast.saving.planner import Planner
from holdfast.saving.save import Saved, begin_save, finish_save
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.store import Store
from holdfast.testing.ranks import run_ranks


class Run:
    """Saves of one run into a folder, or another store."""

    def __init__(
        self,
        folder: Path,
        store: Store | None = None,
        *,
        size: int = 1,
        check_every: int = 0,
    ) -> None:
        self.store: Store = LocalStore(folder) if store is None else store
        self.store.make_folder("")
        self._size, self._planners = size, dict[int, Planner]()
        self._deduplicators = [
            Deduplicator(Catalog(self.store), rank, check_every=check_every) for rank in range(size)
        ]

    def save(self, step: int, state: Mapping[str, Any]) -> Saved:
        """Save a state that every rank holds as a whole."""

        def work(ranks: Ranks) -> Saved:
            pending = begin_save(
                Catalog(self.store),
                step_name(step),
                StateTree(state).flatten(),
                planner=Planner(ranks),
                facts=Manifest({}, {}, step=step, kind="full"),
                deduplicator=self._deduplicators[ranks.rank],
            )
            return finish_save(pending, ranks)

        return work(Solo()) if self._size == 1 else run_ranks(self._size, work)[0]

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a step."""
        return open_manifest(self.store, step_name(step))

    def resume(self, step: int, *, before: int | None = None) -> None:
        """Let the next save know the checkpoint of `step`, and the one before it."""
        before = step - 1 if before is None else before
        manifests = [(step_name(s), self.manifest(s)) for s in (before, step)]
        for deduplicator in self._deduplicators:
            deduplicator.resumed(manifests)


def loaded(store: Store, step: int | str) -> dict[str, Any]:
    """Return everything in a checkpoint, as `flat` does."""
    name = step if isinstance(step, str) else step_name(step)
    checkpoint = Checkpoint(Source(store, name, open_manifest(store, name)))
    found: dict[str, Any] = {name: _bits(checkpoint.read(name)) for name in checkpoint.tensors}
    return found | {name: checkpoint.value(name) for name in checkpoint.manifest.values}


def flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bytes of each tensor of a state, and its values, by name."""
    leaves = StateTree(state).flatten().leaves
    return {
        name: _bits(leaf.value) if isinstance(leaf.value, torch.Tensor) else leaf.value
        for name, leaf in leaves.items()
    }


def _bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), data.numpy().tobytes()


def files_of(folder: Path, step: int) -> dict[str, int]:
    """Return the inode of each data file of a step, by name."""
    files = (folder / step_name(step)).glob("*.distcp")
    return {file.name: file.stat().st_ino for file in files}


def written_bytes(folder: Path, step: int) -> int:
    """Return the bytes of the data files of a step that no earlier step has."""
    others = {
        file.stat().st_ino
        for file in folder.glob("step-*/*.distcp")
        if int(file.parent.name.removeprefix("step-")) < step
    }
    files = (folder / step_name(step)).glob("*.distcp")
    return sum(file.stat().st_size for file in files if file.stat().st_ino not in others)
