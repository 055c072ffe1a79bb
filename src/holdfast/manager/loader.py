"""Loads the state that a run starts from: a checkpoint in its folder, or weights from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE
from holdfast.comm import run_on_rank_0
from holdfast.errors import FormatError, HoldfastError, MismatchError, NotFoundError
from holdfast.failures import tried
from holdfast.format.components import DATALOADER, MODEL, RNG
from holdfast.format.manifest import Manifest
from holdfast.format.names import step_name, step_of
from holdfast.loading.load import load_tree
from holdfast.loading.opening import read_on_all
from holdfast.manager.components import (
    canonical,
    check_dataloader,
    conversions,
    differences,
    hint_for_mismatch,
    ignored_names,
    why_no_generators,
)
from holdfast.manager.context import RunContext
from holdfast.manager.hf import HFFormat
from holdfast.manager.initial import NOT_OF_MODEL, check_matched, find_nested
from holdfast.manager.renames import in_dialect_of, rename, rename_hint
from holdfast.manager.resume import mark_unless_store_failed, newest_resumable, open_requested
from holdfast.manager.resumed import Resumed
from holdfast.manager.saver import Saver
from holdfast.spelling import rate
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree
from holdfast.tier.union import Fetching, LocalCheckpoint, fetching, find


class Loader:
    """Loads the components of a run from a checkpoint.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self,
        run: RunContext,
        components: Mapping[str, Any],
        whole_model: ModelState,
        *,
        hf: HFFormat,
        saver: Saver,
    ) -> None:
        """`components`: objects to load, by name. `whole_model`: the model, including frozen
        parameters that are not saved. `saver` has the fast tier, and is told which checkpoint the
        run resumes from, for retention and deduplication."""
        self._run, self._catalog, self._ranks = run, run.catalog, run.ranks
        self._config, self._goodput = run.config, run.goodput
        self._components, self._whole_model = components, whole_model
        excluded = canonical(run.config.exclude_from_loading)
        self._resumed_names = [name for name in components if name not in excluded]
        self._hf, self._saver = hf, saver

    def load(self, requested: int) -> Resumed:
        """Resume from step `requested`, or for -1 from the newest good checkpoint. If -1 finds no
        checkpoint, load the configured initial weights; if none are configured, start at step 0.

        Raises:
            NotFoundError: there is no step `requested`. Or there are checkpoints, but none of them
                can be resumed from, and no initial weights are configured.
        """
        start = None if self._config.save_frozen else self._load_initial()
        if requested >= 0:
            local = self._local_at(requested)
            if local is not None:
                return self._resume_local(local, explicit=True)
            try:
                return read_on_all(
                    self._ranks,
                    self._catalog.store,
                    partial(open_requested, self._catalog, requested),
                    partial(self._resume, explicit=True),
                )
            except UNREADABLE as error:
                newest = "`load_step = -1` takes the newest good checkpoint"
                error.hint = f"{error.hint}; {newest}" if error.hint else newest
                raise
        resumed, passed_over = self._from_newest()
        if resumed is not None:
            return resumed
        if self._config.save_frozen:
            start = self._load_initial()
        elif passed_over:
            start = None  # A failed load may have overwritten some of the initial weights.
        if start is not None:
            return start
        if passed_over:
            listed = "\n  ".join(passed_over)
            raise NotFoundError(
                f"no step in `{self._catalog.store.url}` can be resumed from:\n  {listed}",
                hint="use another `checkpoint.folder`; with `checkpoint.initial_load_path` it "
                "starts from the weights of a model-only step",
            )
        self._run.info(f"nothing to resume from in {self._catalog.store.url}: starting at step 0")
        return Resumed(0)

    def _from_newest(self) -> tuple[Resumed | None, list[str]]:
        """Resume from the newest checkpoint that can be loaded.

        Returns the result, which is None if there is no such checkpoint, and a line about each
        checkpoint that was passed over.
        """
        passed_over: list[str] = []
        below, num_failed = None, 0
        local = self._local_checkpoints()
        while True:
            opened, refused = run_on_rank_0(
                self._ranks, partial(newest_resumable, self._catalog, below)
            )
            for line in [line for line in refused if line not in passed_over]:
                self._run.warn(f"passed over {line}")
                passed_over.append(line)
            local = [found for found in local if opened is None or _is_newer(found, opened)]
            if local:
                newest = local.pop(0)
                try:
                    return self._resume_local(newest, explicit=False), passed_over
                except UNREADABLE as error:
                    passed_over.append(f"step {newest.step} of the fast tier: {error.what}")
                    self._run.warn(f"passed over {passed_over[-1]}")
                    continue
            if opened is None:
                return None, passed_over
            try:
                return self._resume(opened, explicit=False), passed_over
            except UNREADABLE as error:
                # The same error is raised on every rank, so all ranks try the same step next.
                num_failed += 1
                was_replaced = partial(opened.was_replaced, self._catalog.store)
                if num_failed < LOOKS_MAX and run_on_rank_0(self._ranks, was_replaced):
                    continue
                below = opened.step
                passed_over.append(f"step {below}: {error.what}")
                self._run.warn(f"passed over {passed_over[-1]}")
                if below is not None and self._ranks.rank == 0 and self._run.saves:
                    mark_unless_store_failed(self._catalog, below, error)

    def latest_step(self) -> int | None:
        """Return the newest step to resume from: see `CheckpointManager.latest_step`."""

        def find() -> int | None:
            opened, _ = newest_resumable(self._catalog, None)
            return None if opened is None else opened.step

        steps = [found.step for found in self._local_checkpoints()]
        step = run_on_rank_0(self._ranks, find)
        if step is not None:
            steps.append(step)
        return max(steps, default=None)

    def _local_checkpoints(self) -> list[LocalCheckpoint]:
        """Return the checkpoints of the fast tier, newest first; the same on all ranks."""
        tier = self._saver.tier
        return [] if tier is None else find(tier.local, self._ranks)

    def _local_at(self, step: int) -> LocalCheckpoint | None:
        """Return the fast tier's checkpoint of `step`; None if the fast tier has none, or if the
        folder of the run has one too. Collective."""
        local = [found for found in self._local_checkpoints() if found.step == step]
        if not local or step in run_on_rank_0(self._ranks, self._catalog.steps):
            return None
        return local[0]

    def _resume_local(self, found: LocalCheckpoint, *, explicit: bool) -> Resumed:
        """Resume from a checkpoint of the fast tier. `explicit`: see `_resume`."""
        tier = self._saver.tier
        assert tier is not None, "it has found the checkpoint"
        with fetching(tier.local, found, self._ranks) as fetched:
            return self._resume(fetched.open(), explicit=explicit, fetched=fetched)

    def _resume(
        self, opened: Opened, *, explicit: bool, fetched: Fetching | None = None
    ) -> Resumed:
        """Resume from a checkpoint of the run's folder, or of the fast tier if `fetched` is given.
        Protect its step and newer steps from retention. `explicit`: whether the user has requested
        this step."""
        started = time.perf_counter()
        step, manifest = opened.step, opened.manifest
        assert step is not None, "only checkpoints of this folder are resumed from"
        source = opened.source(self._catalog.store if fetched is None else fetched.store)
        self._hf.check_values(manifest.model, source.url)
        # Step 0 may be a seed or a stock checkpoint, of which only the model is loaded.
        is_full = step > 0 or manifest.kind == "full"
        self._load_components(source, self._resumed_names if is_full else [MODEL], step, fetched)
        speed = rate(manifest.nbytes, time.perf_counter() - started)
        excluded = [name for name in self._components if name not in self._resumed_names]
        without = f", without {', '.join(excluded)}" if excluded and is_full else ""
        self._run.info(f"resumed from step {step}{without}: {speed}, {source.url}")
        steps = run_on_rank_0(self._ranks, self._catalog.steps)
        newer = [other for other in steps if other > step]
        self._saver.retainer.resumed(step, newer)
        if self._saver.deduplicator is not None and is_full:
            earlier = run_on_rank_0(self._ranks, partial(self._before, step))
            self._saver.deduplicator.resumed([*earlier, (step_name(step), manifest)])
        if newer and self._run.saves:
            self._run.warn(
                f"steps {newer} are newer than step {step}: they stay, each until this run saves "
                "the same step, pinned ones too; to keep one, copy it now"
                + (", and `load_step = -1` takes the newest" if explicit else "")
            )
        return Resumed(step, "checkpoint" if is_full else "seed", source.url)

    def _before(self, step: int) -> list[tuple[str, Manifest]]:
        """Return folder name and manifest of the newest resumable checkpoint before `step`, as a
        list of one pair. The list is empty if there is no such checkpoint."""
        found = tried(lambda: newest_resumable(self._catalog, step)[0])
        # Without such a checkpoint, the next save links nothing and writes everything.
        if found is None or isinstance(found, HoldfastError) or found.step is None:
            return []
        return [(step_name(found.step), found.manifest)]

    def _load_initial(self) -> Resumed | None:
        """Load the configured initial weights. Return None if none are configured."""
        path = self._config.initial_load_path
        then = ": starting at step 0" if self._config.save_frozen else ", to train in part"
        if self._config.initial_load_in_hf:
            loaded = self._hf.load(path, self._model())
            self._goodput.note_load(loaded, 0, self._ranks)
            self._run.info(f"loaded the model of {loaded.where}{then}")
            return Resumed(0, "initial", loaded.where)
        if path is None:
            return None
        store, name = open_for_reading(path)
        opened = run_on_rank_0(self._ranks, lambda: open_in(store, name))
        source = opened.source(store)
        if self._config.initial_load_model_only:
            where = self._load_initial_model(source)
            self._run.info(f"loaded the model of {where}{then}")
            return Resumed(0, "initial", source.url)
        source = replace(source, manifest=self._renamed(source.manifest))
        self._hf.check_values(source.manifest.model, source.url)
        step = source.manifest.step if source.manifest.step is not None else step_of(name) or 0
        self._load_components(source, self._resumed_names, step)
        self._run.info(f"loaded {source.url}: going on from step {step}")
        return Resumed(step, "initial", source.url)

    def _load_initial_model(self, source: Source) -> str:
        """Load the model of a checkpoint as initial weights. Return the place of the model, for the
        log."""
        config, where = self._config, source.url
        nested = None
        if not config.initial_load_renames:
            nested = find_nested(
                source.manifest,
                self._whole_model,
                self._ranks,
                partial=not config.initial_load_strict,
            )
        if nested is not None:
            where = f"{where}, {nested}"
            source = replace(source, manifest=nested.manifest)
        source = replace(source, manifest=self._renamed(source.manifest))
        self._hf.check_values(source.manifest.model, source.url)
        tree = self._model(ignored_names(source.manifest, [MODEL]))
        try:
            self._load_tree(source, tree, 0, partial_load=not config.initial_load_strict)
        except MismatchError as error:
            if not config.initial_load_renames:
                names = self._whole_model.state_dict()
                error.hint = rename_hint(source.manifest.tensors, names) or error.hint
            raise
        return where

    def _renamed(self, manifest: Manifest) -> Manifest:
        manifest = in_dialect_of(manifest, self._whole_model.state_dict())
        return rename(manifest, self._config.initial_load_renames)

    def _load_components(
        self, source: Source, names: Sequence[str], step: int, fetched: Fetching | None = None
    ) -> None:
        manifest, wanted = source.manifest, list(names)
        why_afresh = why_no_generators(manifest, self._ranks.size) if RNG in wanted else None
        if why_afresh is not None:
            wanted.remove(RNG)
        if DATALOADER in wanted:
            check_dataloader(manifest, self._ranks.size)
        components = {name: self._components[name] for name in wanted}
        ignored = ignored_names(manifest, names, self._config.exclude_from_loading)
        tree = StateTree(components, flat=MODEL, others={*self._run.others, *ignored})
        self._load_tree(source, tree, step, fetched=fetched)
        if why_afresh is not None:
            self._run.info(f"random number generators start afresh: {why_afresh}")

    def _load_tree(
        self,
        source: Source,
        tree: StateTree,
        step: int,
        *,
        partial_load: bool = False,
        fetched: Fetching | None = None,
    ) -> None:
        try:
            loaded = load_tree(
                source,
                tree,
                ranks=self._ranks,
                partial=partial_load,
                # All ranks of a host can read the files that were fetched to its disk.
                replicas=self._config.load_replicas if fetched is None else "read",
                fetch=None if fetched is None else fetched.fetch,
            )
        except (FormatError, MismatchError) as error:
            error.hint = hint_for_mismatch(error, self._run.others) or error.hint
            raise
        if partial_load:
            check_matched(loaded, self._ranks, hint=NOT_OF_MODEL)
        self._goodput.note_load(loaded, step, self._ranks)
        self._run.warn(*differences(loaded), *conversions(loaded, source.manifest))

    def _model(self, ignored: Collection[str] = ()) -> StateTree:
        others = {*self._run.others, *ignored}
        return StateTree({MODEL: self._whole_model}, flat=MODEL, others=others)


def _is_newer(found: LocalCheckpoint, opened: Opened) -> bool:
    """Return whether `found` in the fast tier is at least as new as `opened` in the run's folder.
    Of two checkpoints of the same step, the one that was committed later is newer."""
    assert opened.step is not None, "only checkpoints of this folder are resumed from"
    return (found.step, found.created) >= (opened.step, opened.manifest.created)
