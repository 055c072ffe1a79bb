"""The `CheckpointManager`: what a training loop holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Solo, all_ranks, run_on_all, run_on_rank_0
from holdfast.errors import MismatchError, NotFoundError
from holdfast.format.manifest import Kind
from holdfast.format.names import checked_step, step_of
from holdfast.hf.export import HFModel
from holdfast.loading.load import load_tree
from holdfast.manager import arguments
from holdfast.manager.arguments import Metrics
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.goodput import RESUMING, Goodput, Timings
from holdfast.manager.holding import Holding
from holdfast.manager.hub import Hub
from holdfast.manager.parts import (
    DATALOADER,
    MODEL,
    OPTIMIZER,
    RNG,
    SCHEDULER,
    beside,
    check_dataloader,
    check_excluded,
    converted,
    differences,
    left_alone,
    many,
    not_excluded,
    other_generators,
    way_on,
)
from holdfast.manager.policy import (
    check_seed,
    is_due,
    kind_in_time,
    kind_of_save,
    stopping_line,
)
from holdfast.manager.renames import as_here
from holdfast.manager.resume import ResumableStep, newest_final
from holdfast.manager.resuming import Resuming
from holdfast.manager.saver import Saver
from holdfast.manager.signals import StopSignals
from holdfast.manager.waiting import StepWaits
from holdfast.spelling import rate
from holdfast.state.model import ModelState, adapted
from holdfast.state.objects import StateTree
from holdfast.state.optim import OptimizerState
from holdfast.state.schedulers import scheduler_component
from holdfast.state.tree import Stateful
from holdfast.storage.opening import folder_store
from holdfast.uncompiled import uncompiled

logger = logging.getLogger("holdfast")


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
        self.config = arguments.checked_config(config)
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
            *(self._catalog, self.config, self._ranks, self._sections),
            *(self._goodput, self._hub),
        )
        self._owed = False
        self._stop_signals = StopSignals(())
        check_excluded(self.config.exclude_from_loading, self._parts)
        self._resumed = not_excluded(self._parts, self.config.exclude_from_loading)
        if self._saves:
            try:
                run_on_rank_0(self._ranks, partial(self._held.take, self._catalog, self._hub))
            except BaseException:
                with self._held:
                    raise

    @property
    def _saves(self) -> bool:
        return self.config.enable and not self.config.load_only

    @uncompiled
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
                (self._say if kind == "full" else self._warn)(line)
            elif not self._is_time(step, last_step, bool(busy), measured):
                return self._export(step)
            saved = kind is not None and self._save_as(
                kind, step, last_step=last_step, metrics=metrics
            )
            if last_step or stopping:
                saver.collect()
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
            self._warn(f"step {step} is not saved: the save before it is still being written")
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

    @uncompiled
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

    @uncompiled
    def load(self, step: int | None = None) -> int:
        """Resume. Returns the step to go on from; 0 where there is nothing to resume from.

        `step` defaults to `load_step`. -1 takes the newest step that is whole and can be resumed
        from; damaged ones are passed over, which the log says. A number takes that step, or raises.
        Step 0, a seed, gives the model alone. Where the folder holds no step, `initial_load_path`
        is loaded if it is set.

        Collective: every rank calls this, and all take the same step.

        Raises:
            NotFoundError: no such step; or there are steps, but none can be resumed from.
            MismatchError: a checkpoint of another model; nothing was changed.
            DamagedError: the step asked for is damaged.
            StorageError: the step asked for cannot be read.
        """
        self._held.check_open()
        wanted = self.config.load_step
        if step is not None:
            wanted = run_on_all(self._ranks, lambda: checked_step(step, "step", least=-1))
        with self._goodput.lost_to(RESUMING):
            return self._load(wanted)

    def _load(self, wanted: int) -> int:
        if not self.config.enable:
            return 0
        self.wait_for_staging()
        base = None if self.config.save_frozen else self._load_initial()
        resuming = Resuming(self._catalog, self._ranks, self._resume, self._warn, self._saves)
        if wanted >= 0:
            return resuming.from_step(wanted)
        found, passed_over = resuming.from_newest()
        if found is not None:
            return found
        # Of what is trained, a step that proved damaged may have been read in part: no fresh start.
        start = self._load_initial() if self.config.save_frozen else None if passed_over else base
        if start is not None:
            return start
        if passed_over:
            listed = "\n  ".join(passed_over)
            raise NotFoundError(
                f"no step in `{self._catalog.store.url}` can be resumed from:\n  {listed}",
                hint="use another `checkpoint.folder`; with `checkpoint.initial_load_path` it "
                "starts from the weights of a model-only step",
            )
        self._say(f"nothing to resume from in {self._catalog.store.url}: starting at step 0")
        return 0

    @uncompiled
    def final_step(self) -> int | None:
        """The newest good step, where it holds the model alone: there a run came to its end.

        Collective: every rank calls this.
        """
        if not self.config.enable:
            return None
        return run_on_rank_0(self._ranks, partial(newest_final, self._catalog))

    @uncompiled
    def wait(self) -> None:
        """Return once everything saved is published and durable.

        Collective: every rank calls this. Raises what went wrong in the background.
        """
        if self._held.is_open:
            self._saver.collect()

    @uncompiled
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
        elif self._held.is_open:
            # Whoever stops has a deadline: what is not deleted by then, the next start sweeps.
            with self._held:
                self._saver.collect()

    def _resume(self, found: ResumableStep, explicit: bool) -> int:
        """Load a step of this folder, and remember the course that the run is on."""
        started = time.perf_counter()
        source = Source(self._catalog.store, found.folder, found.manifest)
        self._load_parts(source, self._resumed if found.step else [MODEL], found.step)
        done = rate(found.manifest.nbytes, time.perf_counter() - started)
        self._say(f"resumed from step {found.step}: {done}, {source.url}")
        steps = run_on_rank_0(self._ranks, self._catalog.steps)
        left_behind = [step for step in steps if step > found.step]
        self._saver.retainer.resumed(found.step, left_behind)
        if left_behind and self._saves and explicit:
            self._warn(
                f"steps {left_behind} are newer than step {found.step}: they stay, each until "
                "this run saves the same step, and `load_step = -1` takes the newest"
            )
        return found.step

    def _load_initial(self) -> int | None:
        """Load weights from elsewhere, if there are to be any. Returns the step to go on from."""
        path = self.config.initial_load_path
        then = ": starting at step 0" if self.config.save_frozen else ", to train in part"
        if self.config.initial_load_in_hf:
            loaded = self._hub.load(path, self._model(self._whole))
            self._goodput.note_load(loaded, 0, self._ranks)
            self._say(f"loaded the model of {loaded.where}{then}")
            return 0
        if path is None:
            return None
        store, name = open_for_reading(path)
        manifest = run_on_rank_0(self._ranks, lambda: open_manifest(store, name))
        manifest = as_here(manifest, self._whole, self.config.initial_load_renames)
        source = Source(store, name, manifest)
        if self.config.initial_load_model_only:
            partial_load = not self.config.initial_load_strict
            tree = self._model(self._whole, left_alone(manifest, [MODEL]))
            self._load_tree(source, tree, 0, partial_load=partial_load)
            self._say(f"loaded the model of {source.url}{then}")
            return 0
        step = manifest.step if manifest.step is not None else step_of(name) or 0
        self._load_parts(source, self._resumed, step)
        self._say(f"loaded {source.url}: going on from step {step}")
        return step

    def _load_parts(self, source: Source, names: Sequence[str], step: int) -> None:
        manifest = source.manifest
        wanted = list(names)
        if RNG in wanted and (why := other_generators(manifest, self._ranks.size)):
            self._say(f"random number generators start afresh: {why}")
            wanted.remove(RNG)
        if DATALOADER in wanted:
            check_dataloader(manifest, self._ranks.size)
        parts = {part: self._parts[part] for part in wanted}
        others = {*self._sections, *left_alone(manifest, names, self.config.exclude_from_loading)}
        self._load_tree(source, StateTree(parts, flat=MODEL, others=others), step)

    def _load_tree(
        self, source: Source, tree: StateTree, step: int, *, partial_load: bool = False
    ) -> None:
        manifest = source.manifest
        replicas = self.config.load_replicas
        try:
            loaded = load_tree(
                source, tree, ranks=self._ranks, partial=partial_load, replicas=replicas
            )
        except MismatchError as error:
            error.hint = way_on(error, self._sections) or error.hint
            raise
        self._goodput.note_load(loaded, step, self._ranks)
        self._warn(*differences(loaded))
        self._warn(*converted(loaded, manifest))

    def _save_as(
        self, kind: Kind, step: int, *, last_step: bool, metrics: Metrics | None = None
    ) -> bool:
        """Save all parts, or the model alone: in the export dtype where it is the last step."""
        numbers = run_on_all(self._ranks, partial(arguments.numbers_in, metrics))
        self._goodput.count_save()
        use = self._hub.use(step, last_step=last_step, saved=True)
        if kind == "full":
            return self._saver.save(step, kind, self._tree.flatten, metrics=numbers, use=use)
        dtype: torch.dtype | None = getattr(torch, self.config.export_dtype)
        dtype = dtype if last_step and use != "step" else None
        flatten = self._model().flatten
        return self._saver.save(step, kind, flatten, dtype=dtype, metrics=numbers, use=use)

    def _export(self, step: int) -> bool:
        """Save a Hugging Face folder alone, if this step is one for that. Returns False: a step is
        not saved."""
        use = self._hub.use(step, last_step=False, saved=False)
        if use is not None:
            self._saver.save(step, "model", self._model().flatten, use=use)
        return False

    def _model(self, state: ModelState | None = None, beside: Collection[str] = ()) -> StateTree:
        others = {*self._sections, *beside}
        return StateTree({MODEL: state or self._kept}, flat=MODEL, others=others)

    def _say(self, line: str) -> None:
        if self._ranks.rank == 0:
            logger.info(line)

    def _warn(self, *lines: str) -> None:
        for line in lines if self._ranks.rank == 0 else ():
            logger.warning(line)
