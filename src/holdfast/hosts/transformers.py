"""Holdfast in transformers' `Trainer`, and in the trainers that derive from it.

    class SafeTrainer(holdfast.hosts.transformers.HoldfastMixin, transformers.Trainer): ...

Written for transformers 5.24 and TRL 1.16.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from holdfast.catalog.catalog import location
from holdfast.catalog.paths import full_path, open_for_saving, open_parent
from holdfast.catalog.seal import sealed
from holdfast.comm import Ranks, all_ranks, run_on_all, run_on_rank_0
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.names import number_of
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.choosing import (
    newest_good_on_all_hosts,
    none_good,
    run_on_hosts,
)
from holdfast.hosts.folders import (
    HostFolder,
    fetch_newest_on_all_hosts,
    fetch_on_all_hosts,
    folder_beside,
    host_folder,
    identity,
    is_first_of_host,
    make_host_folder,
)
from holdfast.hosts.sealing import check_shared, delete, sealed_by_all, warning_if_old_stay
from holdfast.hosts.trainer_checkpoints import (
    CHECKPOINT,
    STATE,
    above,
    check_path,
    checkpoints,
    checkpoints_in,
    exists,
    first_that_exists,
    is_whole,
    named,
    remove_sentinel,
)
from holdfast.hosts.uploading import uploaded_by_all
from holdfast.storage.opening import (
    check_not_shortened,
    is_url,
    store_to_save,
    without_scheme,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger: logging.Logger = logging.getLogger("holdfast")


class HoldfastMixin(_Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints appear complete or not at all, with checksums.

    List it before the trainer: `class SafeTrainer(HoldfastMixin, SFTTrainer): ...`. The files of a
    checkpoint stay the Trainer's, and `holdfast.seal` is added to them. Arguments keep their
    meaning; these do more:

    * `output_dir` may be the URL of an object store. Checkpoints are saved there. Other files of
      the Trainer stay on this machine, in a folder that a warning names.
    * `train(resume_from_checkpoint=True)` takes the newest checkpoint that is not damaged, and says
      which ones it passes over. A path is checked before it is loaded.
    * `save_total_limit` counts good checkpoints only, so damaged ones never push them out.
    * `load_best_model_at_end` checks the best checkpoint before it is loaded.
    """

    _staged: str | None = None
    """Hidden folder of the save in progress, which the Trainer uses as its output folder."""

    _push_waits = False
    """Whether the save in progress is to be pushed to the Hub once it is published."""

    _resumed_from: str | None = None
    """Checkpoint that this run resumed from, as `identity` gives it."""

    _url: str | None = None
    """URL that was given as `output_dir`. The Trainer's own `output_dir` is then a folder."""

    _fetched: HostFolder | None = None
    """Folder of this host with the copy of a checkpoint that was loaded from a URL."""

    _is_first = False
    """Whether this rank is the first of its host, in a run that saves to a URL."""

    _best_before: tuple[str, ...] = ()
    """URLs at which the best checkpoint may be, according to the checkpoint that was loaded from
    a URL."""

    _ranks_here: Ranks | None = None

    _background_here: BackgroundSync | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the Trainer.

        Raises:
            UsageError: Holdfast cannot write to the URL in `output_dir`, or the arguments do not
                fit a URL there.
        """
        settings = import_module("transformers").TrainingArguments

        def kept_here(given: Any) -> Any:
            if not isinstance(given, settings) or not given.output_dir:
                return given
            url = without_scheme(given.output_dir)
            if not is_url(url):
                check_not_shortened(url)
                return given
            self._url = full_path(url)
            check_shared(self._url, not given.save_on_each_node)
            if given.push_to_hub and given.hub_strategy != "end":
                strategy = given.hub_strategy.value
                raise UsageError(
                    f"`hub_strategy={strategy!r}` pushes local checkpoints, and they are saved to "
                    f"`{self._url}`",
                    hint='pass `hub_strategy="end"`, and call `trainer.push_to_hub()` in the end',
                )
            open_for_saving(f"{self._url}/{named(0)}")
            changed = copy.copy(given)
            changed.output_dir = str(folder_beside(self._url))
            if given.process_index == 0:
                logger.warning(
                    "checkpoints are saved to `%s`; other files of the Trainer stay in `%s`",
                    self._url,
                    changed.output_dir,
                )
            return changed

        args = tuple(map(kept_here, args))
        super().__init__(*args, **{name: kept_here(given) for name, given in kwargs.items()})

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the newest good checkpoint if `resume_from_checkpoint` is True.

        Raises:
            DamagedError: every checkpoint, or the one at the given path, is damaged.
            NotFoundError: there is no checkpoint at a URL.
            StorageError: the last checkpoint could not be made durable, or the object store does
                not answer.
        """
        self._resumed_from, self._best_before = None, ()
        if self._url is None and is_url(self.args.output_dir):
            raise UsageError(
                f"`output_dir` became the URL `{self.args.output_dir}` after the trainer was made",
                hint="pass the URL in the `TrainingArguments` that the trainer is made with",
            )
        if self._url is not None:
            store = store_to_save(self._url)
            # Check the bucket now, not at the first save.
            run_on_rank_0(self._ranks(), lambda: store.make_folder(""))
            self._is_first = is_first_of_host(self._ranks())
            if self._is_first:
                for left in Path(self.args.output_dir).glob("checkpoint-*"):
                    remove_sentinel(left)
        try:
            if resume_from_checkpoint:
                resume_from_checkpoint = self._good(resume_from_checkpoint)
            trained = super().train(resume_from_checkpoint, *args, **kwargs)
            self._wait()
        finally:
            self._delete_fetched()
        return trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does. A URL gets a sealed checkpoint.

        Without a path, and if `output_dir` of the arguments is a URL, the model is saved to `model`
        below that URL.
        """
        if output_dir is not None:
            output_dir = without_scheme(output_dir)
            check_not_shortened(output_dir)
        whole_run = ("", self._url, self.args.output_dir)
        is_whole_run = (output_dir or "").rstrip("/") in whole_run
        if self._url is not None and is_whole_run and not _internal_call:
            # The folder of the run holds checkpoints, so it cannot be one.
            output_dir = f"{self._url}/model"
            if self.args.should_save:
                logger.warning("the model is saved to `%s`", output_dir)
        if output_dir is None or not is_url(output_dir):
            super().save_model(output_dir, _internal_call)
            return
        if self.is_fsdp_enabled and not _is_gathered(self.accelerator):
            logger.warning(
                "`%s` is not saved: `save_model` saves nothing with this `state_dict_type`",
                output_dir,
            )
        elif self._saves_on_all_ranks():
            with uploaded_by_all(full_path(output_dir), ranks=self._ranks()) as folder:
                super().save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            # Only this rank writes, and scripts may call this method on this rank alone.
            with sealed(output_dir, overwrite=True) as folder:
                super().save_model(str(folder), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _saves_on_all_ranks(self) -> bool:
        """Return whether all ranks must call `save_model` together."""
        by_transformers = getattr(self, "is_distributed_loading_by_transformers", False)
        config = self.args.hf_deepspeed_config if self.is_deepspeed_enabled else None
        is_zero3 = config is not None and config.is_zero3()
        return bool(self.is_fsdp_enabled or is_zero3 or by_transformers)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = super()._get_output_dir(trial=trial)
        name = named(self.state.global_step)
        path = os.path.join(run_folder, name)  # noqa: PTH118 - text, as the Trainer keeps it
        publishes = bool(self.args.should_save)
        # On SIGTERM every rank writes the file `SENTINEL`, so wait for all before deleting it.
        self._ranks().all_reduce_max([0])
        if publishes or (self._url is not None and self._is_first):
            remove_sentinel(Path(path))
        if not self.args.auto_find_batch_size:
            # By now, a checkpoint that was fetched has been loaded. With this setting, it may be
            # loaded again, for a smaller batch.
            self._delete_fetched()
        if self._url is not None:
            path = f"{self._url}{path.removeprefix(self.args.output_dir)}"
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
            self._rotate(path)
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
        best = self.state.best_model_checkpoint
        if not is_url(best):
            self._good(best)
            super()._load_best_model()
            return
        with host_folder(self._ranks()) as folder:
            try:
                fetched = fetch_on_all_hosts(best, folder, self._ranks())
                self.state.best_model_checkpoint = str(fetched)
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best

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
        """Return the checkpoint to load: `wanted`; for True, the newest good one. A checkpoint at a
        URL is copied to each host. Collective."""
        ranks, decides = self._ranks(), bool(self.args.should_save)
        root = self._url or self.args.output_dir
        if wanted is not True:
            wanted = os.fspath(wanted)
            self._resumed_from = identity(wanted)
            if is_url(wanted):
                url, into = full_path(wanted), self._fetch_into()
                fetched = fetch_on_all_hosts(url, into, ranks, marker=STATE)
                return self._prepared(fetched, url.rpartition("/")[0])
            run_on_hosts(ranks, lambda: check_path(Path(wanted)), decides=decides)
            return wanted
        if self._url is not None:
            newest = fetch_newest_on_all_hosts(
                root, CHECKPOINT, into=self._fetch_into(), ranks=ranks, last_file=STATE
            )
        else:
            newest = newest_good_on_all_hosts(
                Path(root), CHECKPOINT, ranks=ranks, decides=decides, last_file=STATE
            )
        if newest is None:
            run_on_hosts(ranks, lambda: self._refuse_damaged(root), decides=decides)
            # Without any checkpoint in a folder, the Trainer's own error is the clearest.
            return True
        self._resumed_from = identity(f"{root}/{newest.name}")
        return str(newest) if self._url is None else self._prepared(newest, root)

    def _prepared(self, fetched: Path, root: str) -> str:
        """Remove the best checkpoint from the state in a copy of a checkpoint. The Trainer would
        look for it on this machine. `_init_training_state` adds it again. `root`: URL of the folder
        of the checkpoint. Collective."""
        file = fetched / STATE

        def remove_best() -> str | None:
            state = json.loads(file.read_bytes())
            file.write_text(json.dumps({**state, "best_model_checkpoint": None}))
            best: str | None = state.get("best_model_checkpoint")
            return best

        ranks = self._ranks()
        is_first = is_first_of_host(ranks)
        best = ranks.broadcast(run_on_all(ranks, lambda: remove_best() if is_first else None))
        if best is not None:
            beside = f"{root}/{PurePath(best).name}"
            self._best_before = (beside, best) if is_url(best) else (beside,)
        return str(fetched)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(*args, **kwargs)
        if self._best_before:
            best = run_on_rank_0(self._ranks(), lambda: first_that_exists(self._best_before))
            self.state.best_model_checkpoint = best
            if best is None and self.args.should_save:
                logger.warning("the best checkpoint `%s` is gone", self._best_before[-1])
        return started

    def _refuse_damaged(self, root: str) -> None:
        """Raise a DamagedError if `root`, which has no good checkpoint, has damaged ones. Raise a
        NotFoundError if `root` is a URL without any checkpoint."""
        if checkpoints(root):
            raise none_good(root)
        if self._url is not None:
            raise NotFoundError(
                f"`{root}` has no checkpoint", hint="start without `resume_from_checkpoint`"
            )

    def _fetch_into(self) -> Path:
        self._fetched = make_host_folder(self._ranks())
        return self._fetched.path

    def _delete_fetched(self) -> None:
        if self._fetched is not None:
            self._fetched.delete()

    def _correct_best(self, staged: str, path: str) -> None:
        """Store the final path of the best checkpoint in the Trainer's state and in its file.

        `staged`: hidden folder with that file. `path`: final path of the checkpoint being saved.
        """
        best_step, known = self.state.best_global_step, self.state.best_model_checkpoint
        if not best_step:
            return
        is_new = best_step == self.state.global_step
        best = path if is_new else f"{above(path)}/{named(best_step)}"
        # The Trainer looks for the best checkpoint in the hidden folder, its output folder for now.
        if known != best and (is_new or exists(best)):
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, STATE))  # noqa: PTH118

    def _rotate(self, saved: str) -> None:
        """Delete checkpoints older than the one just saved until `save_total_limit` remain: the one
        just saved, the best, and the newest good ones. Later steps stay. The checkpoint that the
        run resumed from stays until the run has saved twice."""
        limit = self.args.save_total_limit
        if not limit or limit <= 0:
            return
        with warning_if_old_stay(saved):
            self._delete_old(saved, limit)

    def _delete_old(self, saved: str, limit: int) -> None:
        store, name = open_parent(saved)
        last = number_of(name) or 0
        steps = [n for n in checkpoints_in(store) if (number_of(n) or 0) <= last]
        good = [other for other in steps if is_whole(store, other)]
        # Not `location`: the store may spell its URL in another way.
        paths = {other: identity(f"{above(saved)}/{other}") for other in steps}
        best = self.state.best_model_checkpoint
        kept = {name}
        kept |= {other for other in steps if best and paths[other] == identity(best)}
        # If too few are good, others are kept too, such as checkpoints without a seal.
        for other in (*good, *steps):
            if len(kept) < limit:
                kept.add(other)
        for other in steps:
            if other not in kept and paths[other] != self._resumed_from:
                path = location(store, other)
                self._background().delete(path, partial(delete, path))
        # After the next save, this run has two checkpoints of its own, and needs no other.
        self._resumed_from = None


def _is_gathered(accelerator: Any) -> bool:
    """Return whether the Trainer's `save_model` gathers and saves a model that FSDP has sharded."""
    return "FULL_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type)
