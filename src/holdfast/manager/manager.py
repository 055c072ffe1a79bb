"""The `CheckpointManager`: what a training loop holds."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, Solo, all_ranks, capture, run_on_all, run_on_rank_0
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Kind
from holdfast.format.names import checked_step
from holdfast.hf.export import HFModel
from holdfast.manager import arguments
from holdfast.manager.arguments import Metrics
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.goodput import RESUMING, Goodput, Timings
from holdfast.manager.holding import Holding
from holdfast.manager.hub import Hub
from holdfast.manager.loader import Loader, say, warn
from holdfast.manager.parts import (
    MODEL,
    OPTIMIZER,
    SCHEDULER,
    beside,
    check_excluded,
    many,
)
from holdfast.manager.policy import (
    check_seed,
    is_due,
    kind_in_time,
    kind_of_save,
    stopping_line,
)
from holdfast.manager.resume import newest_final
from holdfast.manager.saver import Saver
from holdfast.manager.signals import StopSignals
from holdfast.manager.waiting import StepWaits
from holdfast.state.model import ModelState, adapted
from holdfast.state.objects import StateTree
from holdfast.state.optim import OptimizerState
from holdfast.state.schedulers import scheduler_component
from holdfast.state.tree import Stateful
from holdfast.storage.opening import folder_store
from holdfast.uncompiled import uncompiled

logger: logging.Logger = logging.getLogger("holdfast")

P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(
    method: Callable[Concatenate[CheckpointManager, P], T],
) -> Callable[Concatenate[CheckpointManager, P], T]:
    """Let a thread wait for the call of another one: one save begins where the one before ends."""

    @uncompiled
    @wraps(method)
    def called(self: CheckpointManager, /, *args: P.args, **kwargs: P.kwargs) -> T:
        # A forked child may have a copy of the lock that nobody will release.
        if not self._held.is_open:
            return method(self, *args, **kwargs)
        with self._calls:
            return method(self, *args, **kwargs)

    return called


class CheckpointManager:
    """Saves a training run as it goes, and resumes it.

        with CheckpointManager("outputs/checkpoint", model=model, optimizers=optimizer) as manager:
            step = manager.load()
            while step < 1000:
                ...
                step += 1
                manager.save(step)

    Collective where `torch.distributed` is initialized: every rank makes one and calls its methods
    in the same order; an error on one rank is raised on all.
    """

    @uncompiled
    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: nn.Module | Sequence[nn.Module],
        optimizers: Optimizer | Sequence[Optimizer] = (),
        lr_schedulers: LRScheduler | Sequence[LRScheduler] = (),
        dataloader: Stateful | None = None,
        states: Mapping[str, Stateful] | None = None,
        config: CheckpointConfig | None = None,
        ranks: Ranks | None = None,
        hub: HFModel | None = None,
    ) -> None:
        """Take hold of `folder`: what killed runs left there is swept, other runs are kept out.

        `model` may be several parts (pipeline stages); `states` are further objects by name.
        The state of a `dataloader` is kept for each rank, unless the loader says
        `state_is_global = True`.
        `config` defaults to saving every 500 steps; `ranks` to those of `torch.distributed`. `hub`
        says what the model is called on the Hugging Face hub, for what goes there or comes from it.

        Raises:
            UsageError: an argument of another type, two parts of one name, or a `folder` that is a
                URL; nothing was touched.
            ExistsError: another run saves in this folder, or another manager of this process.
            StorageError: the folder cannot be written.
        """
        self.config: CheckpointConfig = arguments.checked_config(config)
        self._goodput = Goodput()
        self._ranks = all_ranks() if ranks is None else arguments.checked_ranks(ranks)
        arguments.check(
            self._ranks,
            folder=folder,
            model=model,
            optimizers=optimizers,
            lr_schedulers=lr_schedulers,
            dataloader=dataloader,
            states=states,
            hub=hub,
            config=self.config,
        )
        self._catalog = Catalog(folder_store(folder))
        models = many(model)
        self._kept = self._whole = ModelState(models)
        if not self.config.save_frozen:
            self._kept, self._whole = adapted(models)
        self._parts: dict[str, Any] = {
            MODEL: self._kept,
            OPTIMIZER: OptimizerState(models, many(optimizers)),
            SCHEDULER: scheduler_component(many(lr_schedulers)),
            **(states or {}),
            **beside(dataloader, self._ranks.rank),
        }
        self._held = Holding()
        overlaps = self.config.async_mode == "async_with_pinned_mem"
        waits = StepWaits(self._held, self.wait_for_staging)
        for optimizer in many(optimizers) if overlaps else ():
            waits.add(optimizer)
        self._tree = StateTree(self._parts, flat=MODEL, watch=waits.add if overlaps else None)
        self._sections = [name for name in self._parts if name != MODEL]
        self._hub = Hub(hub, self.config, self._catalog, self._ranks, self._sections)
        self._saver = Saver(
            catalog=self._catalog,
            config=self.config,
            ranks=self._ranks,
            sections=self._sections,
            goodput=self._goodput,
            hub=self._hub,
        )
        self._calls = threading.RLock()
        self._owed = False
        self._knows_folder = False
        self._stop_signals = StopSignals(())
        check_excluded(self.config.exclude_from_loading, self._parts)
        self._loader = Loader(
            catalog=self._catalog,
            config=self.config,
            ranks=self._ranks,
            components=self._parts,
            whole=self._whole,
            hub=self._hub,
            goodput=self._goodput,
            retainer=self._saver.retainer,
            saves=self._saves,
        )
        if self._saves:
            try:
                run_on_rank_0(self._ranks, partial(self._held.take, self._catalog, self._hub))
            except BaseException:
                with self._held:
                    raise

    @property
    def _saves(self) -> bool:
        return self.config.enable and not self.config.load_only

    @_one_at_a_time
    def save(self, step: int, last_step: bool = False, *, metrics: Metrics | None = None) -> bool:
        """Save the state after `step` if it is due. Returns whether it was saved.

        `metrics` are numbers by name to keep with the step, for `keep_best_metric` and for people;
        or a function that gives them, called on every rank only when the step is saved. Those of
        rank 0 are kept.

        Blocks until the step is published and durable; with `async_mode = "async"` until its state
        has been copied, and what then goes wrong is raised by a later call. With
        `async_with_pinned_mem` the copy of parameters and optimizer state goes on after it returns;
        the optimizers wait for it by themselves before they step, see `wait_for_staging`.

        Inside the context of this manager, one of `stop_signals` to any rank makes the next call
        save, whatever the interval, and then raise SystemExit with status 128 + signal on every
        rank.

        Collective: every rank calls this after every step.

        Raises:
            UsageError: an argument of another type, or other arguments than another rank's.
            HoldfastError: the step could not be saved, on every rank; the steps before it stand.
                With `on_save_error = "warn"` that is logged, and the run goes on.
        """
        self._held.check_open()
        call = arguments.call_of(step, last_step, metrics)
        if not self._saves:
            arguments.agreed(Solo(), call, arguments.told_of(call))
            return False
        self._goodput.count_step()
        self._kept.note_trained()
        with self._goodput.lost_to("saving"):
            # What any rank has measured or received decides, so that all decide alike.
            saver = self._saver
            numbers = self._ranks.all_reduce_max(
                [
                    *arguments.told_of(call),
                    *self._stop_signals.received(),
                    *(saver.full_save_s, saver.model_share),
                    *(float(saver.failed), float(saver.busy)),
                    *self._goodput.measured(),
                ]
            )
            step, last_step, rest = arguments.agreed(self._ranks, call, numbers)
            number, since_s, full_save_s, model_share, failed, busy, *measured = rest
            if failed:
                saver.collect()
            stopping = bool(number) and not last_step
            kind: Kind | None = kind_of_save(last_step=last_step, config=self.config)
            if stopping:
                left_s = self.config.stop_deadline_s - since_s
                kind = kind_in_time(left_s, full_save_s, model_share)
                line = stopping_line(int(number), step, left_s, full_save_s, kind)
                (say if kind == "full" else warn)(self._ranks, line)
            elif not self._is_time(step, last_step, bool(busy), measured):
                return self._export(step)
            saved = kind is not None and self._save_as(
                kind, step, last_step=last_step, metrics=metrics
            )
            if last_step or stopping:
                saver.collect()
        if number:
            self._stop_signals.forget()
        if stopping:
            raise SystemExit(128 + int(number))
        return saved

    def _is_time(self, step: int, last_step: bool, busy: bool, measured: Sequence[float]) -> bool:
        """Whether this step is saved, now: it is due or owed, and no save is in its way."""
        progress = self._goodput.progress(*measured)
        due = is_due(step, last_step=last_step, config=self.config, progress=progress)
        due, self._owed = due or self._owed, False
        if not due or last_step or not busy or self.config.on_save_overlap == "wait":
            return due
        self._owed = self.config.on_save_overlap == "queue"
        if not self._owed:
            warn(
                self._ranks, f"step {step} is not saved: the save before it is still being written"
            )
        return False

    @uncompiled
    def wait_for_staging(self) -> None:
        """Return once the state of the last `save` has been copied, so that it may be changed.

        Optimizers in the state of this manager, given as `optimizers` or below `states`, do this by
        themselves before each step; whoever changes parameters or optimizer state in another way
        calls it first.
        """
        # In a forked child the thread that copies is not there to be waited for.
        if self._held.is_open:
            self._saver.wait_for_staging()

    @uncompiled
    def timings(self) -> Timings:
        """How long saves and loads took, by stage and over all ranks: those that came to their end
        since the last call. Known to rank 0; elsewhere there are none."""
        return self._goodput.timings()

    @property
    def blocked_s(self) -> float:
        """Seconds that saving has held up training so far."""
        return self._goodput.blocked_s

    @uncompiled
    def goodput(self) -> str:
        """Where the time since this manager was made went: training, and what it lost by cause."""
        return self._goodput.report()

    @_one_at_a_time
    def save_seed(self) -> None:
        """Save the model as it is, in its own dtypes, as step 0: what other runs can start from.

        Collective: every rank calls this.

        Raises:
            ExistsError: the folder holds steps, which a run in it would go on from, or this would
                replace.
        """

        self._held.check_open()
        run_on_rank_0(
            self._ranks, lambda: check_seed(self._catalog.steps(), self._catalog.store.url)
        )
        self._save_as("model", 0, last_step=False)
        self._saver.collect()

    @_one_at_a_time
    def load(self, step: int | None = None) -> int:
        """Resume. Returns the step to go on from; 0 where there is nothing to resume from.

        `step` defaults to `load_step`. -1 takes the newest step that is whole and can be resumed
        from; damaged ones are passed over, which the log says. A number takes that step, or raises.
        A seed, or a stock checkpoint at step 0, gives the model alone. Where the folder holds no
        step, `initial_load_path` is loaded if it is set.

        Collective: every rank calls this, and all take the same step.

        Raises:
            NotFoundError: no such step; or there are steps, but none can be resumed from.
            MismatchError: a checkpoint of another model; nothing was changed. Or an object refuses
                its state, or a number is too large for a smaller float: then the state is loaded
                in part.
            DamagedError: the step asked for is damaged.
            StorageError: the step asked for cannot be read.
        """
        self._held.check_open()
        wanted = self.config.load_step
        if step is not None:
            wanted = run_on_all(self._ranks, lambda: checked_step(step, "step", least=-1))
        if not self.config.enable:
            return 0
        self._knows_folder = True
        self.wait_for_staging()
        with self._goodput.lost_to(RESUMING):
            return self._loader.load(wanted)

    @uncompiled
    def final_step(self) -> int | None:
        """The newest good step, where it holds the model alone: there a run came to its end.

        Collective: every rank calls this.
        """
        if not self.config.enable:
            return None
        return run_on_rank_0(self._ranks, partial(newest_final, self._catalog))

    @_one_at_a_time
    def wait(self) -> None:
        """Return once everything saved is published and durable.

        Collective: every rank calls this. Raises what went wrong in the background.
        """
        if self._held.is_open:
            self._saver.collect()

    @_one_at_a_time
    def close(self) -> None:
        """Finish what is under way and give up the folder: nothing is saved or loaded afterwards.
        Further calls do nothing, and neither do calls in a forked child."""
        if self._held.is_open:
            with self._held:
                self._saver.collect()
                self._saver.retainer.wait()

    @uncompiled
    def __enter__(self) -> Self:
        self._held.check_open()
        if self._saves:
            self._stop_signals = StopSignals(self.config.stop_signals)
            self._held.callback(self._stop_signals.release)
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
        elif self._held.is_open:
            # Whoever stops has a deadline: what is not deleted by then, the next start sweeps.
            with self._held:
                self._saver.collect()

    def _save_as(
        self, kind: Kind, step: int, *, last_step: bool, metrics: Metrics | None = None
    ) -> bool:
        """Save all parts, or the model alone: in the export dtype where it is the last step."""
        numbers = run_on_all(self._ranks, partial(arguments.numbers_in, metrics))
        self._goodput.count_save()
        self._warn_of_newer_steps(step)
        use = self._hub.use(step, last_step=last_step, saved=True)
        if kind == "full":
            return self._saver.save(step, kind, self._tree.flatten, metrics=numbers, use=use)
        dtype: torch.dtype | None = getattr(torch, self.config.export_dtype)
        dtype = dtype if last_step and use != "step" else None
        flatten = self._model().flatten
        return self._saver.save(step, kind, flatten, dtype=dtype, metrics=numbers, use=use)

    def _warn_of_newer_steps(self, step: int) -> None:
        """Say once that a run which has loaded nothing saves beside another run's steps."""
        if self._knows_folder or self._ranks.rank:
            return
        self._knows_folder = True
        steps = capture(self._catalog.steps)
        # Where the folder cannot be listed, the save itself says so.
        newer = [] if isinstance(steps, HoldfastError) else [one for one in steps if one > step]
        if newer:
            warn(
                self._ranks,
                f"step {step} is saved beside {len(newer)} newer checkpoints, up to step "
                f"{newer[-1]}, and `load` was not called: the next start resumes from the newest; "
                "another folder keeps two runs apart",
            )

    def _export(self, step: int) -> bool:
        """Save a Hugging Face folder alone, if this step is one for that. Returns False: a step is
        not saved."""
        use = self._hub.use(step, last_step=False, saved=False)
        if use is not None:
            self._saver.save(step, "model", self._model().flatten, use=use)
        return False

    def _model(self) -> StateTree:
        return StateTree({MODEL: self._kept}, flat=MODEL, others=self._sections)
