"""Decides after each step whether and what to save, with the same result on all ranks."""

from __future__ import annotations

from functools import partial

import torch

from holdfast import accelerator
from holdfast.comm import Solo, is_restarted_on_failure, run_on_all, run_on_rank_0
from holdfast.errors import ExistsError, HoldfastError
from holdfast.failures import tried
from holdfast.format.components import MODEL
from holdfast.format.manifest import Kind
from holdfast.manager import arguments
from holdfast.manager.arguments import Metrics
from holdfast.manager.context import RunContext
from holdfast.manager.goodput import SAVING_LOCALLY
from holdfast.manager.hf import HFFormat
from holdfast.manager.policy import Progress, is_due, kind_in_time, stopping_line
from holdfast.manager.saver import Saver, Target
from holdfast.manager.signals import StopSignals
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree


class StepSaver:
    """Saves steps of a run when they are due, when a signal stops the run, and at its end.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self,
        run: RunContext,
        saver: Saver,
        hf: HFFormat,
        *,
        model: ModelState,
        tree: StateTree,
        raises_on_stop: bool = True,
    ) -> None:
        """`tree` is the whole state, `model` the model in it. `raises_on_stop`: whether the save
        after a stop signal raises SystemExit."""
        self._run, self._catalog, self._ranks = run, run.catalog, run.ranks
        self._config, self._goodput = run.config, run.goodput
        self._saver, self._hf, self._model, self._tree = saver, hf, model, tree
        self._queued = False
        in_background = run.saves and run.config.async_mode != "disabled"
        self._asks_for_memory = in_background and accelerator.num_devices() > 0
        self._raises_on_stop = raises_on_stop
        self.stop_requested: bool = False
        """Whether a stop signal has come to any rank."""
        self.stop_signals: StopSignals = StopSignals(())
        """Signals after which the run saves and ends."""
        self.knows_folder: bool = False
        """Whether the run has called `load`, or has looked for newer checkpoints in its folder."""

    def save(self, step: int, *, last_step: bool, force: bool, metrics: Metrics | None) -> bool:
        """Save the state after `step` if it is due: see `CheckpointManager.save`."""
        if not self._run.saves:
            arguments.agree(Solo(), step, metrics, last_step=last_step, force=force)
            return False
        self._goodput.count_step()
        self._model.note_trained()
        with self._goodput.lost_to("saving"):
            step, (last_step, force), largest = arguments.agree(
                self._ranks, step, metrics, self._progress(), last_step=last_step, force=force
            )
            # The maxima are the same on all ranks, so all ranks decide alike.
            progress = Progress._make(largest)
            if progress.failed:
                self._saver.settle()
            stopping = bool(progress.signal) and not last_step
            target = self._target(step, last_step or force or stopping, progress)
            if target is None:
                if progress.lacks_memory:
                    self._saver.reserve_ahead(self._tree.flatten)
                self._export(step)
                return False
            kind: Kind | None = "full"
            if stopping:
                kind = self._kind_before_stop(step, progress)
                if kind is not None:
                    self._saver.give_up_drain()
            elif last_step and self._config.last_save_model_only:
                kind = "model"
            cause = SAVING_LOCALLY if target == "local" else "saving"
            with self._goodput.lost_to(cause):
                saved = kind is not None and self._save_as(
                    kind, step, last_step=last_step, metrics=metrics, target=target
                )
            if last_step or stopping:
                self._saver.collect()
        if progress.signal:
            self.stop_signals.forget()
            self.stop_requested = True
        if stopping and self._raises_on_stop:
            # Exit with 0 under `torchrun`: any other status would make it restart the job on some
            # hosts.
            raise SystemExit(0 if is_restarted_on_failure() else 128 + int(progress.signal))
        return saved

    def save_seed(self) -> None:
        """Save the model as step 0: see `CheckpointManager.save_seed`."""
        steps = run_on_rank_0(self._ranks, self._catalog.steps)
        if steps:
            where = self._catalog.store.url
            raise ExistsError(
                f"`{where}` holds step {steps[-1]}, and a seed must be the first checkpoint",
                hint="set another `checkpoint.folder`, or delete this one",
            )
        self._save_as("model", 0, last_step=False)
        self._saver.collect()

    def _progress(self) -> Progress:
        """Return the measurements of this rank after the current step."""
        saver = self._saver
        signal, signal_age_s = self.stop_signals.received()
        return self._goodput.progress()._replace(
            full_save_s=saver.full_save_s,
            model_share=saver.model_share,
            failed=saver.failed,
            busy=saver.background.busy,
            draining=saver.draining,
            lacks_memory=self._lacks_memory(),
            signal=signal,
            signal_age_s=signal_age_s,
        )

    def _lacks_memory(self) -> bool:
        """Return whether snapshots need page-locked memory, which takes seconds to reserve. Only
        the first call looks at all parameters; later calls return False."""
        if not self._asks_for_memory:
            return False
        self._asks_for_memory = False
        parameters = (p for part in self._model.parts for p in part.parameters())
        return bool(accelerator.devices_of(parameters))

    def _kind_before_stop(self, step: int, progress: Progress) -> Kind | None:
        """Log and return the kind of save that fits before the deadline; None if no save fits."""
        left_s = self._config.stop_deadline_s - progress.signal_age_s
        kind = kind_in_time(left_s, progress.full_save_s, progress.model_share)
        line = stopping_line(int(progress.signal), step, left_s, progress.full_save_s, kind)
        (self._run.info if kind == "full" else self._run.warn)(line)
        return kind

    def _target(self, step: int, forced: bool, progress: Progress) -> Target | None:
        """Return the place that the save after `step` goes to; None if no save is due, or it is
        skipped or queued. `forced`: whether the step is saved in any case."""
        due = self._queued or is_due(step, last_step=forced, config=self._config, progress=progress)
        owes, self._saver.owes_durable = self._saver.owes_durable, False
        self._queued = False
        if forced or owes:
            return "durable"
        has_tier, busy = self._saver.tier is not None, bool(progress.busy)
        if due and not self._is_late(step, busy or bool(progress.draining)):
            return "drained" if has_tier else "durable"
        if not has_tier or step % self._config.local_interval:
            return None
        return None if busy and self._config.on_save_overlap != "wait" else "local"

    def _is_late(self, step: int, busy: bool) -> bool:
        """Return whether the save that is due now cannot begin, since the previous one is still in
        progress (`busy`). If so, queue or skip the due save: see `on_save_overlap`."""
        overlap = self._config.on_save_overlap
        if not busy or overlap == "wait":
            return False
        self._queued = overlap == "queue"
        if not self._queued:
            self._run.warn(f"step {step} is not saved: the save before it is still being written")
        return True

    def _save_as(
        self,
        kind: Kind,
        step: int,
        *,
        last_step: bool,
        metrics: Metrics | None = None,
        target: Target = "durable",
    ) -> bool:
        """Save all components, or only the model. A model-only save at the last step casts the
        model to `export_dtype`. Returns whether the step is saved or being saved."""
        numbers = run_on_all(self._ranks, partial(arguments.numbers_in, metrics))
        if target != "local":
            self._goodput.count_save()
        self._warn_of_newer_steps(step)
        export = self._hf.export_at(step, last_step=last_step, saved=True)
        tree, dtype = self._tree, None
        if kind == "model":
            tree = self._model_alone()
            if last_step and export != "as_step":
                dtype = getattr(torch, self._config.export_dtype)
        return self._saver.save(
            step,
            kind,
            tree.flatten,
            dtype=dtype,
            metrics=numbers,
            export=export,
            target=target,
        )

    def _export(self, step: int) -> None:
        """Export the model of a step that is not saved, if an export is due."""
        export = self._hf.export_at(step, last_step=False, saved=False)
        if export is not None:
            self._saver.save(step, "model", self._model_alone().flatten, export=export)

    def _model_alone(self) -> StateTree:
        return StateTree({MODEL: self._model}, flat=MODEL, others=self._run.others)

    def _warn_of_newer_steps(self, step: int) -> None:
        """Log one warning if the run's folder has checkpoints of later steps than `step`, and this
        run has not called `load`."""
        if self.knows_folder or self._ranks.rank:
            return
        self.knows_folder = True
        steps = tried(self._catalog.steps)
        # If the folder cannot be listed, the save itself raises the error.
        newer = [] if isinstance(steps, HoldfastError) else [n for n in steps if n > step]
        if newer:
            self._run.warn(
                f"step {step} is saved beside {len(newer)} newer checkpoints, up to step "
                f"{newer[-1]}, and `load` was not called: the next start resumes from the newest; "
                "another folder keeps two runs apart",
            )
