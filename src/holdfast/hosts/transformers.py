"""Holdfast in transformers' `Trainer`, and in the trainers that derive from it.

    class SafeTrainer(holdfast.hosts.transformers.HoldfastMixin, transformers.Trainer): ...

Written for transformers 5.24 and TRL 1.16.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.catalog.findings import summary_of
from holdfast.catalog.newest import check, newest_good
from holdfast.comm import Ranks, all_ranks, run_on_rank_0
from holdfast.errors import DamagedError, HoldfastError
from holdfast.format.names import number_of
from holdfast.hosts.sealing import delete, sealed_by_all

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

    Put it before the trainer: `class SafeTrainer(HoldfastMixin, SFTTrainer): ...`. The files of a
    checkpoint stay the Trainer's, and `holdfast.seal` is added to them. Arguments keep their
    meaning; these do more:

    * `train(resume_from_checkpoint=True)` takes the newest checkpoint that is not damaged, and says
      which ones it passes over. A path is checked before it is loaded.
    * `save_total_limit` counts good checkpoints only, so damaged ones never push them out.
    * `load_best_model_at_end` checks the best checkpoint before it is loaded.
    """

    _staged: str | None = None
    """Folder of the save in progress, which stands for the output folder."""

    _push_waits = False
    """Whether the save in progress is to be pushed to the Hub once it is published."""

    _ranks_here: Ranks | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the newest good checkpoint if `resume_from_checkpoint` is True.

        Raises:
            DamagedError: every checkpoint, or the one at the given path, is damaged.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._good(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = super()._get_output_dir(trial=trial)
        name = f"checkpoint-{self.state.global_step}"
        path = os.path.join(run_folder, name)  # noqa: PTH118 - text, as the Trainer keeps it
        publishes = bool(self.args.should_save)
        if publishes:
            _remove_sentinel(Path(path))
        with sealed_by_all(
            path, ranks=self._ranks(), publishes=publishes, moves_aside=True
        ) as folder:
            # The Trainer writes to `checkpoint-N` in its output folder: that is the folder itself.
            link = folder / name
            if publishes:
                link.symlink_to(".")
            self._ranks().all_reduce_max([0])
            self._staged = str(folder)
            try:
                super()._save_checkpoint(model, trial)
                self._correct_best(str(folder), path)
            finally:
                self._staged = None
            self._ranks().all_reduce_max([0])
            if publishes:
                link.unlink()
        if publishes:
            self._rotate(Path(run_folder))
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
            # The upload runs in a thread, and would lose the folder when that is renamed.
            self._push_waits = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        self._good(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _ranks(self) -> Ranks:
        if self._ranks_here is None:
            self._ranks_here = all_ranks()
        return self._ranks_here

    def _good(self, wanted: Any) -> Any:
        """The checkpoint to load: `wanted`, or the newest good one if it is True. Collective."""
        folder = str(self.args.output_dir)

        def find() -> Any:
            if wanted is not True:
                if findings := check(wanted):
                    raise DamagedError(
                        f"`{wanted}` is damaged: {summary_of(findings)}",
                        hint="`resume_from_checkpoint=True` takes the newest good one",
                    )
                return wanted
            newest = newest_good(folder, "checkpoint-[0-9]*") if os.path.isdir(folder) else None  # noqa: PTH112
            if newest is None and _checkpoints(Path(folder)):
                raise DamagedError(
                    f"no checkpoint in `{folder}` is good",
                    hint=f"`holdfast doctor {folder}` says what is wrong with each",
                )
            # Without any checkpoint, the Trainer's own error is the clearest.
            return True if newest is None else str(newest)

        return run_on_rank_0(self._ranks(), find)

    def _correct_best(self, staged: str, path: str) -> None:
        """Name the best checkpoint by its later path, in the Trainer's state and its file."""
        best = self.state.best_model_checkpoint
        if best is not None and str(best).startswith(staged):
            self.state.best_model_checkpoint = path
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, _STATE))  # noqa: PTH118

    def _rotate(self, folder: Path) -> None:
        """Keep `save_total_limit` good checkpoints: the newest, and the best."""
        limit = self.args.save_total_limit
        if not limit or limit <= 0:
            return
        checkpoints = _checkpoints(folder)
        good = [path for path in checkpoints if _is_whole(path)]
        best = self.state.best_model_checkpoint
        kept = set(good[:1])
        kept |= {path for path in checkpoints if best and path.resolve() == Path(best).resolve()}
        for path in good:
            if len(kept) < limit:
                kept.add(path)
        for path in checkpoints[checkpoints.index(good[0]) :] if good else ():
            if path not in kept:
                delete(path)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the Trainer in a folder, the newest first."""
    paths = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(paths, key=lambda path: number_of(path.name) or 0, reverse=True)


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint has all files, each with its size."""
    if not (path / "holdfast.seal").exists():
        return False
    try:
        return not check(path, quick=True)
    except HoldfastError:
        return False


def _remove_sentinel(path: Path) -> None:
    """Remove a folder that holds nothing but the sentinel of a save on SIGTERM."""
    if path.is_dir() and [entry.name for entry in path.iterdir()] == [_SENTINEL]:
        (path / _SENTINEL).unlink()
        path.rmdir()
