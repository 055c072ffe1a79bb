"""Holdfast in transformers' `Trainer`, and in the trainers that derive from it.

    class SafeTrainer(holdfast.hosts.transformers.HoldfastMixin, transformers.Trainer): ...

Written for transformers 5.24 and TRL 1.16.
"""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.catalog.newest import check
from holdfast.comm import Ranks, all_ranks, run_on_all
from holdfast.errors import HoldfastError
from holdfast.format.names import number_of
from holdfast.format.seal import SEAL
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.choosing import (
    check_sealed,
    newest_good_on_all_hosts,
    none_good,
    run_on_hosts,
)
from holdfast.hosts.sealing import delete, sealed_by_all
from holdfast.storage.opening import local_path

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger: logging.Logger = logging.getLogger("holdfast")

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")

_STATE = "trainer_state.json"

_SENTINEL = "checkpoint-is-incomplete.txt"
"""File that the Trainer writes into the folder before it saves on SIGTERM."""


class HoldfastMixin(_Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints appear complete or not at all, with checksums.

    List it before the trainer: `class SafeTrainer(HoldfastMixin, SFTTrainer): ...`. The files of a
    checkpoint stay the Trainer's, and `holdfast.seal` is added to them. Arguments keep their
    meaning; these do more:

    * `train(resume_from_checkpoint=True)` takes the newest checkpoint that is not damaged, and says
      which ones it passes over. A path is checked before it is loaded.
    * `save_total_limit` counts good checkpoints only, so damaged ones never push them out.
    * `load_best_model_at_end` checks the best checkpoint before it is loaded.
    """

    _staged: str | None = None
    """Hidden folder of the save in progress, which the Trainer uses as its output folder."""

    _push_waits = False
    """Whether the save in progress is to be pushed to the Hub once it is published."""

    _resumed_from: Path | None = None
    """Checkpoint that this run resumed from."""

    _ranks_here: Ranks | None = None

    _background_here: BackgroundSync | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the newest good checkpoint if `resume_from_checkpoint` is True.

        Raises:
            DamagedError: every checkpoint, or the one at the given path, is damaged.
            StorageError: the last checkpoint could not be made durable.
            UsageError: `output_dir` is a URL, or no path.
        """
        local_path(self.args.output_dir)
        self._resumed_from = None
        if resume_from_checkpoint:
            resume_from_checkpoint = self._good(resume_from_checkpoint)
            if resume_from_checkpoint is not True:
                self._resumed_from = Path(resume_from_checkpoint).resolve()
        trained = super().train(resume_from_checkpoint, *args, **kwargs)
        self._wait()
        return trained

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = super()._get_output_dir(trial=trial)
        name = f"checkpoint-{self.state.global_step}"
        path = os.path.join(run_folder, name)  # noqa: PTH118 - text, as the Trainer keeps it
        publishes = bool(self.args.should_save)
        # On SIGTERM every rank writes the file `_SENTINEL`, so wait for all before deleting it.
        self._ranks().all_reduce_max([0])
        if publishes:
            _remove_sentinel(Path(path))
        # The Trainer writes to `checkpoint-N` in its output folder, which is the hidden folder for
        # now. There this name is a link to the hidden folder itself.
        with sealed_by_all(
            path,
            ranks=self._ranks(),
            publishes=publishes,
            background=self._background(),
            shared=not self.args.save_on_each_node,
            moves_aside=True,
            link=name,
        ) as folder:
            self._staged = str(folder)
            try:
                super()._save_checkpoint(model, trial)
                self._correct_best(str(folder), path)
            finally:
                self._staged = None
        if publishes:
            self._rotate(Path(path))
        if self._push_waits:
            self._push_waits = False
            super()._push_from_checkpoint(path)

    def _get_output_dir(self, trial: Any) -> str:
        if self._staged is not None:
            return self._staged
        folder: str = super()._get_output_dir(trial=trial)
        return folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged is not None:
            # The upload runs in a thread, and would fail when the folder is renamed.
            self._push_waits = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # The Trainer deletes old checkpoints in this method: wait until the others are durable.
        self._wait()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._good(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _ranks(self) -> Ranks:
        if self._ranks_here is None:
            self._ranks_here = all_ranks()
        return self._ranks_here

    def _background(self) -> BackgroundSync:
        if self._background_here is None:
            self._background_here = BackgroundSync()
        return self._background_here

    def _wait(self) -> None:
        """Wait until all checkpoints are durable. Collective."""
        run_on_all(self._ranks(), self._background().wait)

    def _good(self, wanted: Any) -> Any:
        """Return the checkpoint to load: `wanted`; for True, the newest good one. Collective."""
        ranks, decides = self._ranks(), bool(self.args.should_save)
        if wanted is not True:
            run_on_hosts(ranks, lambda: _check_path(Path(wanted)), decides=decides)
            return wanted
        folder = Path(self.args.output_dir)
        newest = newest_good_on_all_hosts(
            folder, _CHECKPOINT, ranks=ranks, decides=decides, last_file=_STATE
        )
        if newest is None:
            run_on_hosts(ranks, lambda: _refuse_damaged(folder), decides=decides)
        # Without any checkpoint, the Trainer's own error is the clearest.
        return True if newest is None else str(newest)

    def _correct_best(self, staged: str, path: str) -> None:
        """Store the final path of the best checkpoint in the Trainer's state and in its file.

        `staged`: hidden folder with that file. `path`: final path of the checkpoint being saved.
        """
        best_step, named = self.state.best_global_step, self.state.best_model_checkpoint
        if not best_step:
            return
        best = Path(path).parent / f"checkpoint-{best_step}"
        is_there = best == Path(path) or best.is_dir()
        # The Trainer looks for the best checkpoint in the hidden folder, its output folder for now.
        if is_there and named != str(best):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, _STATE))  # noqa: PTH118

    def _rotate(self, saved: Path) -> None:
        """Delete checkpoints older than the one just saved until `save_total_limit` remain: the one
        just saved, the best, and the newest good ones. Later steps stay. The checkpoint that the
        run resumed from stays until the run has saved twice."""
        limit = self.args.save_total_limit
        if not limit or limit <= 0:
            return
        checkpoints = _checkpoints(saved.parent)
        checkpoints = checkpoints[checkpoints.index(saved) :]
        good = [path for path in checkpoints if _is_whole(path)]
        best = self.state.best_model_checkpoint
        kept = {saved}
        kept |= {path for path in checkpoints if best and path.resolve() == Path(best).resolve()}
        # If too few are good, others are kept too, such as checkpoints without a seal.
        for path in (*good, *checkpoints):
            if len(kept) < limit:
                kept.add(path)
        for path in checkpoints:
            if path not in kept and path.resolve() != self._resumed_from:
                self._background().delete(str(path), partial(delete, path.absolute()))
        # After the next save, this run has two checkpoints of its own, and needs no other.
        self._resumed_from = None


def _check_path(path: Path) -> None:
    """Raise a DamagedError if the checkpoint is damaged. Warn if it has no seal to check."""
    if not path.is_dir():
        return  # The Trainer's own error says more.
    check_sealed(path, hint="`resume_from_checkpoint=True` takes the newest good one")


def _refuse_damaged(folder: Path) -> None:
    """Raise a DamagedError if a folder without a good checkpoint has other checkpoints."""
    if folder.is_dir() and _checkpoints(folder):
        raise none_good(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of the Trainer in a folder, the newest first."""
    paths = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=lambda path: number_of(path.name) or 0, reverse=True)


def _is_whole(path: Path) -> bool:
    """Return whether a checkpoint has a seal, and all files that the seal lists, in these sizes."""
    if not (path / SEAL).exists():
        return False
    try:
        return not check(path, quick=True)
    except HoldfastError:
        return False


def _remove_sentinel(path: Path) -> None:
    """Delete the file that the Trainer writes into a folder before it saves there on SIGTERM.

    If the folder is empty then, delete the folder.
    """
    (path / _SENTINEL).unlink(missing_ok=True)
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
