"""The `CheckpointManager`: saves and resumes a training run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from types import TracebackType
from typing import Concatenate, Literal, ParamSpec, Self, TypeVar, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, all_ranks, run_on_all, run_on_rank_0
from holdfast.format.components import MODEL, OPTIMIZER, SCHEDULER
from holdfast.format.names import checked_step
from holdfast.hf.export import HFModel
from holdfast.manager import arguments
from holdfast.manager.arguments import Metrics, as_list
from holdfast.manager.components import check_excluded, components_per_rank
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.context import OnSaved, RunContext
from holdfast.manager.goodput import RESUMING, Timings
from holdfast.manager.hf import HFFormat
from holdfast.manager.lifetime import Lifetime, OptimizerHooks
from holdfast.manager.loader import Loader
from holdfast.manager.resume import newest_final
from holdfast.manager.resumed import Resumed
from holdfast.manager.saver import Saver
from holdfast.manager.signals import StopSignals
from holdfast.manager.step_saver import StepSaver
from holdfast.saving.seen import check_start
from holdfast.state.model import ModelState, adapted
from holdfast.state.objects import StateTree
from holdfast.state.optim import OptimizerState
from holdfast.state.schedulers import SchedulerState
from holdfast.state.tree import Stateful
from holdfast.storage.opening import store_to_save
from holdfast.storage.store import Store
from holdfast.uncompiled import uncompiled

P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(
    method: Callable[Concatenate[CheckpointManager, P], T],
) -> Callable[Concatenate[CheckpointManager, P], T]:
    """Return `method` with a lock: a call waits while another thread is in a method of the same
    manager that has this decorator."""

    @uncompiled
    @wraps(method)
    def call(self: CheckpointManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        # In a forked child, the lock may be held by a thread of the parent, and never released.
        if not self._lifetime.is_open:
            return method(self, *args, **kwargs)
        with self._calls:
            return method(self, *args, **kwargs)

    return call


class CheckpointManager:
    """Saves a training run as it goes, and resumes it.

        with CheckpointManager("outputs/checkpoint", model=model, optimizers=optimizer) as manager:
            step = manager.load()
            while step < 1000:
                ...
                step += 1
                manager.save(step)

    Collective if `torch.distributed` is initialized: every rank makes one and calls its methods in
    the same order. An error on one rank is raised on all.
    """

    @uncompiled
    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizers: Optimizer | Stateful | Sequence[Optimizer] = (),
        lr_schedulers: LRScheduler | Sequence[LRScheduler] = (),
        dataloader: Stateful | None = None,
        states: Mapping[str, Stateful] | None = None,
        config: CheckpointConfig | None = None,
        ranks: Ranks | None = None,
        hub: HFModel | None = None,
        store: Store | None = None,
        on_stop: Literal["raise", "return"] = "raise",
        on_saved: OnSaved | None = None,
    ) -> None:
        """Lock `folder` against other runs, and clean up what killed runs left there.

        `model` may be a list of pipeline stages. `states` are further objects to save, by name. The
        state of a `dataloader` is saved once for each rank, unless `state_is_global` of the loader
        is True, as in `holdfast.data.ElasticLoader`. `config` defaults to a save every 500 steps,
        `ranks` to those of `torch.distributed`. `hub` describes the model in Hugging Face format,
        for exports and for loading Hugging Face folders.

        `optimizers` may be one object that holds optimizers; then its own `state_dict` is saved.
        `store`: store for the checkpoints, in place of `folder`, which must be None then.
        `on_stop`: action of `save` once it has saved after a stop signal. `raise` raises
        SystemExit, `return` returns with `stop_requested` set. `on_saved(step, path, metrics)` is
        called on rank 0 once a checkpoint is durable; after a background save, the thread of that
        save calls it. Its errors are logged.

        Raises:
            UsageError: an argument has the wrong type, two components have the same name, or
                `folder` is a URL to which Holdfast cannot write. Nothing was changed.
            MismatchError: the settings ask for exports, and the model has other tensors than `hub`
                describes. Nothing was changed.
            ExistsError: another run, or another manager of this process, saves to this folder.
            StorageError: the folder cannot be written.
        """
        self.config: CheckpointConfig = arguments.checked_config(config)
        ranks = all_ranks() if ranks is None else arguments.checked_ranks(ranks)
        arguments.check(
            ranks,
            self.config,
            folder=folder,
            model=model,
            optimizers=optimizers,
            lr_schedulers=lr_schedulers,
            dataloader=dataloader,
            states=states,
            hub=hub,
            store=store,
            on_stop=on_stop,
            on_saved=on_saved,
        )
        models = as_list(model)
        saved_model = whole_model = ModelState(models)
        if not self.config.save_frozen:
            saved_model, whole_model = adapted(models)
        is_container = arguments.is_container(optimizers)
        single = [] if is_container else cast("list[Optimizer]", as_list(optimizers))
        components = {
            MODEL: saved_model,
            OPTIMIZER: optimizers if is_container else OptimizerState(models, single),
            SCHEDULER: SchedulerState(as_list(lr_schedulers)),
            **(states or {}),
            **components_per_rank(dataloader, ranks.rank),
        }
        check_excluded(self.config.exclude_from_loading, components)
        names = [name for name in components if name != MODEL]
        catalog = Catalog(store_to_save(folder or "") if store is None else store)
        catalog.renames_kept = True
        self._run = RunContext(catalog, self.config, ranks, names, on_saved=on_saved)
        hf = HFFormat(self._run, hub, models)
        self._calls = threading.RLock()
        self._lifetime = Lifetime()
        self._stop_signals = StopSignals(())
        hooks = OptimizerHooks(self._lifetime, self.wait_for_staging)
        overlaps = self.config.async_mode == "async_with_pinned_mem"
        for optimizer in as_list(optimizers) if overlaps else ():
            hooks.add(cast("Optimizer", optimizer))
        tree = StateTree(components, flat=MODEL, watch=hooks.add if overlaps else None)
        self._saver = Saver(self._run, hf)
        self._steps = StepSaver(
            self._run,
            self._saver,
            hf,
            model=saved_model,
            tree=tree,
            raises_on_stop=on_stop == "raise",
        )
        self._loader = Loader(self._run, components, whole_model, hf=hf, saver=self._saver)
        try:
            if self._run.saves:
                hf.check_live(saved_model)
            self._open(hf)
        except BaseException:
            with self._lifetime:
                raise

    def _open(self, hf: HFFormat) -> None:
        """Lock the folder of the run, check that all hosts share it, and start the fast tier if one
        is configured. A run that does not save does only the check. Collective."""
        run = self._run

        def take() -> None:
            self._lifetime.take(run.catalog, hf)
            self._saver.check_links()

        if run.saves:
            run_on_rank_0(run.ranks, take)
        if run.config.enable:
            check_start(run.catalog, run.ranks, saves=run.saves)
        if run.saves and run.config.local_folder is not None:
            self._saver.start_tier(run.config.local_folder, self._lifetime)

    @_one_at_a_time
    def load(self, step: int | None = None) -> Resumed:
        """Resume the run. Returns the step to continue from, an int that also says what was loaded;
        0 if there is nothing to resume from.

        `step` defaults to `load_step`. -1 takes the newest good checkpoint, and logs the newer ones
        that it passes over because they are damaged or hold only the model. Any other number takes
        that step, or raises an error. If step 0 is a seed checkpoint or a stock checkpoint, only
        its model is loaded. If -1 finds no checkpoint to resume from, and `initial_load_path` is
        set, that checkpoint is loaded.

        Collective: every rank calls this, and all load the same step.

        Raises:
            NotFoundError: there is no such step, or no checkpoint can be resumed from.
            MismatchError: the checkpoint is of another model; nothing was changed. Or an object
                rejects its state, or a number is too large for a smaller float dtype; then the
                state is loaded in part.
            DamagedError: the requested step is damaged.
            StorageError: the requested step cannot be read.
        """
        self._lifetime.check_open()
        requested = self.config.load_step
        if step is not None:
            requested = run_on_all(self._run.ranks, lambda: checked_step(step, "step", least=-1))
        if not self.config.enable:
            return Resumed(0)
        self._steps.knows_folder = True
        self.wait_for_staging()
        with self._run.goodput.lost_to(RESUMING):
            return self._loader.load(requested)

    @_one_at_a_time
    def save(
        self,
        step: int,
        last_step: bool = False,
        *,
        metrics: Metrics | None = None,
        force: bool = False,
    ) -> bool:
        """Save the state after `step` if a save is due. Returns whether the step is saved.

        `force` saves the step in any case, in full.

        `metrics` are numbers by name, or a function that returns them. Those of rank 0 are stored
        with the checkpoint, for `keep_best_metric` and for people. A function is called on every
        rank, but only if the step is saved.

        Blocks until the checkpoint is published and durable. With `async_mode = "async"`, blocks
        until the state is copied; a later call raises errors of the background save. With
        `async_with_pinned_mem`, parameters and optimizer state are copied after this returns, and
        optimizers wait for the copy before they step: see `wait_for_staging`. Parameters that a
        forward may change (without gradients, or of a module with `max_norm`) are copied before.

        In a `with` block of this manager, one of `stop_signals` to any rank makes the next call
        save, whatever the interval, and raise SystemExit with status 128 + signal on every rank:
        see `on_stop`. Under `torchrun`, which restarts workers that fail, the status is 0.

        Collective: every rank calls this after every step.

        Raises:
            UsageError: an argument has the wrong type, or arguments differ between ranks.
            HoldfastError: the step could not be saved; earlier checkpoints are unchanged. With
                `on_save_error = "warn"`, the error is logged, and the run continues.
        """
        self._lifetime.check_open()
        return self._steps.save(step, last_step=last_step, force=force, metrics=metrics)

    @_one_at_a_time
    def save_seed(self) -> None:
        """Save the model as step 0, in its own dtypes, as a starting point for other runs.

        Collective: every rank calls this.

        Raises:
            ExistsError: the folder already holds checkpoints.
        """
        self._lifetime.check_open()
        self._steps.save_seed()

    @uncompiled
    def wait_for_staging(self) -> None:
        """Wait until the state of the last `save` is copied, and may be changed.

        Optimizers given as `optimizers` or in `states` call this before each step. Call it yourself
        before you change parameters or optimizer state in another way, or the save fails.
        """
        # A forked child has no thread that makes the copy, so it would wait forever.
        if self._lifetime.is_open:
            self._saver.wait_for_staging()

    @_one_at_a_time
    def wait(self) -> None:
        """Wait until everything saved is published and durable.

        Collective: every rank calls this. Raises the error of a background save.
        """
        if self._lifetime.is_open:
            self._saver.settle()

    @property
    def stop_requested(self) -> bool:
        """Whether a stop signal has come to any rank, and `save` has acted on it. The same on all
        ranks: a loop with `on_stop="return"` ends when it is True."""
        return self._steps.stop_requested

    @uncompiled
    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, good or damaged, oldest first.

        Collective: every rank calls this.
        """
        return run_on_rank_0(self._run.ranks, self._run.catalog.steps)

    @uncompiled
    def latest_step(self) -> int | None:
        """Return the newest step that can be resumed from; None if there is none. Only the index of
        its checkpoint and the sizes of the files are checked.

        Collective: every rank calls this.
        """
        return self._loader.latest_step()

    @uncompiled
    def final_step(self) -> int | None:
        """Return the newest good step if its checkpoint holds only the model, as the last one of a
        finished run does; else None.

        Collective: every rank calls this.
        """
        if not self.config.enable:
            return None
        return run_on_rank_0(self._run.ranks, partial(newest_final, self._run.catalog))

    @uncompiled
    def timings(self) -> Timings:
        """Return the durations of the saves and loads that have finished since the last call. Each
        is divided into stages such as `plan` and `write`, and combines all ranks. On ranks other
        than 0, there are none."""
        return self._run.goodput.timings()

    @property
    def blocked_s(self) -> float:
        """Seconds for which saves have blocked training so far."""
        return self._run.goodput.blocked_s

    @uncompiled
    def goodput(self) -> str:
        """Return a line on the time since this manager was made: training, and losses by cause."""
        return self._run.goodput.report()

    @_one_at_a_time
    def close(self) -> None:
        """Finish background work, and release the folder. The manager cannot be used afterwards.

        Does nothing when called again, or in a forked child.
        """
        if self._lifetime.is_open:
            with self._lifetime:
                self._saver.finish()

    @uncompiled
    def __enter__(self) -> Self:
        self._lifetime.check_open()
        if self._run.saves:
            self._stop_signals = StopSignals(self.config.stop_signals)
            self._steps.stop_signals = self._stop_signals
            self._lifetime.callback(self._stop_signals.release)
        return self

    @uncompiled
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            self._stop_signals.pass_on()
        elif self._lifetime.is_open:
            # A stopping run has a deadline: leave unfinished deletions to the next start.
            with self._lifetime:
                self._saver.settle()
