"""Decides after each step, on all ranks alike, whether and what to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from holdfast.comm import Solo, capture, run_on_all, run_on_rank_0
from holdfast.errors import HoldfastError
from holdfast.format.components import MODEL
from holdfast.format.manifest import Kind
from holdfast.manager import arguments
from holdfast.manager.arguments import Metrics
from holdfast.manager.context import RunContext
from holdfast.manager.hf import HFFormat
from holdfast.manager.policy import check_seed, is_due, kind_in_time, kind_of_save, stopping_line
from holdfast.manager.saver import Saver
from holdfast.manager.signals import StopSignals
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree


@dataclass(frozen=True, slots=True)
class _Agreed:
    """A call of `save`, and the largest value of each measurement over all ranks."""

    step: int
    last_step: bool
    signal: int
    """Number of a stop signal that a rank has received; 0 if there is none."""

    since_s: float
    """Seconds since that signal."""

    full_save_s: float
    model_share: float
    failed: bool
    """Whether the background save has failed on any rank."""

    busy: bool
    """Whether any rank is still writing the save before."""

    measured: Sequence[float]
    """Result of `Goodput.measured`."""


class StepSaver:
    """Saves steps of a run when they are due, when a signal stops the run, and at its end.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self, run: RunContext, saver: Saver, hf: HFFormat, *, model: ModelState, tree: StateTree
    ) -> None:
        """`tree` is the whole state, `model` the model in it."""
        self._run, self._catalog, self._ranks = run, run.catalog, run.ranks
        self._config, self._goodput = run.config, run.goodput
        self._saver, self._hf, self._model, self._tree = saver, hf, model, tree
        self._queued = False
        self.stop_signals: StopSignals = StopSignals(())
        """Signals after which the run saves and ends."""
        self.knows_folder: bool = False
        """Whether the run has loaded, or was warned of the newer checkpoints in its folder."""

    def save(self, step: object, last_step: object, metrics: Metrics | None) -> bool:
        """Save the state after `step` if it is due: see `CheckpointManager.save`."""
        call = arguments.call_of(step, last_step, metrics)
        if not self._run.saves:
            arguments.agreed(Solo(), call, arguments.encoded(call))
            return False
        self._goodput.count_step()
        self._model.note_trained()
        with self._goodput.lost_to("saving"):
            agreed = self._agree(call)
            if agreed.failed:
                self._saver.collect()
            stopping = bool(agreed.signal) and not agreed.last_step
            if stopping:
                kind = self._kind_before_stop(agreed)
            elif self._is_time(agreed):
                kind = kind_of_save(last_step=agreed.last_step, config=self._config)
            else:
                self._export(agreed.step)
                return False
            saved = kind is not None and self._save_as(
                kind, agreed.step, last_step=agreed.last_step, metrics=metrics
            )
            if agreed.last_step or stopping:
                self._saver.collect()
        if agreed.signal:
            self.stop_signals.forget()
        if stopping:
            raise SystemExit(128 + agreed.signal)
        return saved

    def save_seed(self) -> None:
        """Save the model as step 0: see `CheckpointManager.save_seed`."""
        run_on_rank_0(
            self._ranks, lambda: check_seed(self._catalog.steps(), self._catalog.store.url)
        )
        self._save_as("model", 0, last_step=False)
        self._saver.collect()

    def _agree(self, call: arguments.Call | HoldfastError) -> _Agreed:
        """Take the maximum of all measurements, so that all ranks decide alike. One collective."""
        saver = self._saver
        numbers = self._ranks.all_reduce_max(
            [
                *arguments.encoded(call),
                *self.stop_signals.received(),
                saver.full_save_s,
                saver.model_share,
                float(saver.failed),
                float(saver.busy),
                *self._goodput.measured(),
            ]
        )
        step, last_step, rest = arguments.agreed(self._ranks, call, numbers)
        signal, since_s, full_save_s, model_share, failed, busy, *measured = rest
        return _Agreed(
            step=step,
            last_step=last_step,
            signal=int(signal),
            since_s=since_s,
            full_save_s=full_save_s,
            model_share=model_share,
            failed=bool(failed),
            busy=bool(busy),
            measured=measured,
        )

    def _kind_before_stop(self, agreed: _Agreed) -> Kind | None:
        """What to save in the time that a stop signal leaves; None if no save fits."""
        left_s = self._config.stop_deadline_s - agreed.since_s
        kind = kind_in_time(left_s, agreed.full_save_s, agreed.model_share)
        line = stopping_line(agreed.signal, agreed.step, left_s, agreed.full_save_s, kind)
        (self._run.info if kind == "full" else self._run.warn)(line)
        return kind

    def _is_time(self, agreed: _Agreed) -> bool:
        """Whether to save now: a save is due or queued, and the save before is not in its way."""
        progress = self._goodput.progress(*agreed.measured)
        due = self._queued or is_due(
            agreed.step, last_step=agreed.last_step, config=self._config, progress=progress
        )
        self._queued = False
        overlap = self._config.on_save_overlap
        if not due or agreed.last_step or not agreed.busy or overlap == "wait":
            return due
        self._queued = overlap == "queue"
        if not self._queued:
            line = f"step {agreed.step} is not saved: the save before it is still being written"
            self._run.warn(line)
        return False

    def _save_as(
        self, kind: Kind, step: int, *, last_step: bool, metrics: Metrics | None = None
    ) -> bool:
        """Save all components, or the model alone, in the export dtype if it is the last step."""
        numbers = run_on_all(self._ranks, partial(arguments.numbers_in, metrics))
        self._goodput.count_save()
        self._warn_of_newer_steps(step)
        export = self._hf.export_at(step, last_step=last_step, saved=True)
        tree, dtype = self._tree, None
        if kind == "model":
            tree = self._model_alone()
            if last_step and export != "as_step":
                dtype = getattr(torch, self._config.export_dtype)
        return self._saver.save(
            step, kind, tree.flatten, dtype=dtype, metrics=numbers, export=export
        )

    def _export(self, step: int) -> None:
        """Export a step that is not saved, if its export is due."""
        export = self._hf.export_at(step, last_step=False, saved=False)
        if export is not None:
            self._saver.save(step, "model", self._model_alone().flatten, export=export)

    def _model_alone(self) -> StateTree:
        return StateTree({MODEL: self._model}, flat=MODEL, others=self._run.others)

    def _warn_of_newer_steps(self, step: int) -> None:
        """Warn once if this run loaded nothing, and the folder has checkpoints of later steps."""
        if self.knows_folder or self._ranks.rank:
            return
        self.knows_folder = True
        steps = capture(self._catalog.steps)
        # If the folder cannot be listed, the save itself raises the error.
        newer = [] if isinstance(steps, HoldfastError) else [n for n in steps if n > step]
        if newer:
            self._run.warn(
                f"step {step} is saved beside {len(newer)} newer checkpoints, up to step "
                f"{newer[-1]}, and `load` was not called: the next start resumes from the newest; "
                "another folder keeps two runs apart",
            )
