"""Loads the state that a run starts from: a checkpoint in its folder, or weights from elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.catalog.steady import UNREADABLE
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.errors import FormatError, MismatchError, NotFoundError
from holdfast.format.components import DATALOADER, MODEL, RNG
from holdfast.format.names import step_of
from holdfast.loading.load import load_tree
from holdfast.loading.opening import open_in
from holdfast.manager.components import (
    check_dataloader,
    conversions,
    differences,
    hint_for_mismatch,
    ignored_names,
    not_excluded,
    why_no_generators,
)
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.fallback import Resumer
from holdfast.manager.goodput import Goodput
from holdfast.manager.hf import HFFormat
from holdfast.manager.renames import with_names_of
from holdfast.manager.resume import ResumableStep
from holdfast.manager.retention import Retainer
from holdfast.spelling import rate
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree

logger: logging.Logger = logging.getLogger("holdfast")


class Loader:
    """Loads the components of a run.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        config: CheckpointConfig,
        ranks: Ranks,
        components: Mapping[str, Any],
        whole_model: ModelState,
        hf: HFFormat,
        goodput: Goodput,
        retainer: Retainer,
        saves: bool,
    ) -> None:
        """`whole_model` includes frozen parameters. `saves`: the run also saves to the folder."""
        self._catalog, self._config, self._ranks = catalog, config, ranks
        self._components, self._whole_model = components, whole_model
        self._not_model = [name for name in components if name != MODEL]
        self._resumed = not_excluded(components, config.exclude_from_loading)
        self._hf, self._goodput, self._retainer, self._saves = hf, goodput, retainer, saves

    def load(self, requested: int) -> int:
        """Resume from step `requested`; -1 takes the newest. Returns the step to continue from."""
        base = None if self._config.save_frozen else self._load_initial()
        resumer = Resumer(
            self._catalog, self._ranks, self._resume, partial(warn, self._ranks), self._saves
        )
        if requested >= 0:
            try:
                return resumer.from_step(requested)
            except UNREADABLE as error:
                newest = "`load_step = -1` takes the newest good checkpoint"
                error.hint = f"{error.hint}; {newest}" if error.hint else newest
                raise
        step, passed_over = resumer.from_newest()
        if step is not None:
            return step
        start = base
        if self._config.save_frozen:
            start = self._load_initial()
        elif passed_over:
            start = None  # A load that failed may have overwritten some trained parameters.
        if start is not None:
            return start
        if passed_over:
            listed = "\n  ".join(passed_over)
            raise NotFoundError(
                f"no step in `{self._catalog.store.url}` can be resumed from:\n  {listed}",
                hint="use another `checkpoint.folder`; with `checkpoint.initial_load_path` it "
                "starts from the weights of a model-only step",
            )
        say(self._ranks, f"nothing to resume from in {self._catalog.store.url}: starting at step 0")
        return 0

    def _resume(self, checkpoint: ResumableStep, explicit: bool) -> int:
        """Load a checkpoint of this folder, and protect it and newer ones from retention."""
        started = time.perf_counter()
        step, manifest = checkpoint.step, checkpoint.manifest
        source = Source(self._catalog.store, checkpoint.folder, manifest)
        # Step 0 may be a seed, or TorchTitan's first step, of which only the model is loaded.
        is_full = step > 0 or manifest.kind == "full"
        self._load_components(source, self._resumed if is_full else [MODEL], step)
        speed = rate(manifest.nbytes, time.perf_counter() - started)
        say(self._ranks, f"resumed from step {step}: {speed}, {source.url}")
        steps = run_on_rank_0(self._ranks, self._catalog.steps)
        newer = [other for other in steps if other > step]
        self._retainer.resumed(step, newer)
        if newer and self._saves and explicit:
            warn(
                self._ranks,
                f"steps {newer} are newer than step {step}: they stay, each until this run saves "
                "the same step, and `load_step = -1` takes the newest",
            )
        return step

    def _load_initial(self) -> int | None:
        """Load weights from elsewhere if the settings ask for it. Returns the step to continue
        from, or None."""
        path = self._config.initial_load_path
        then = ": starting at step 0" if self._config.save_frozen else ", to train in part"
        if self._config.initial_load_in_hf:
            loaded = self._hf.load(path, self._model())
            self._goodput.note_load(loaded, 0, self._ranks)
            say(self._ranks, f"loaded the model of {loaded.where}{then}")
            return 0
        if path is None:
            return None
        store, name = open_for_reading(path)
        opened = run_on_rank_0(self._ranks, lambda: open_in(store, name))
        rules = self._config.initial_load_renames
        manifest = with_names_of(opened.manifest, self._whole_model, rules)
        source = Source(store, opened.name, manifest)
        if self._config.initial_load_model_only:
            tree = self._model(ignored_names(manifest, [MODEL]))
            partial_load = not self._config.initial_load_strict
            self._load_tree(source, tree, 0, partial_load=partial_load)
            say(self._ranks, f"loaded the model of {source.url}{then}")
            return 0
        step = manifest.step if manifest.step is not None else step_of(name) or 0
        self._load_components(source, self._resumed, step)
        say(self._ranks, f"loaded {source.url}: going on from step {step}")
        return step

    def _load_components(self, source: Source, names: Sequence[str], step: int) -> None:
        manifest, wanted = source.manifest, list(names)
        if RNG in wanted and (why := why_no_generators(manifest, self._ranks.size)):
            say(self._ranks, f"random number generators start afresh: {why}")
            wanted.remove(RNG)
        if DATALOADER in wanted:
            check_dataloader(manifest, self._ranks.size)
        components = {name: self._components[name] for name in wanted}
        ignored = ignored_names(manifest, names, self._config.exclude_from_loading)
        tree = StateTree(components, flat=MODEL, others={*self._not_model, *ignored})
        self._load_tree(source, tree, step)

    def _load_tree(
        self, source: Source, tree: StateTree, step: int, *, partial_load: bool = False
    ) -> None:
        replicas = self._config.load_replicas
        try:
            loaded = load_tree(
                source, tree, ranks=self._ranks, partial=partial_load, replicas=replicas
            )
        except (FormatError, MismatchError) as error:
            error.hint = hint_for_mismatch(error, self._not_model) or error.hint
            raise
        self._goodput.note_load(loaded, step, self._ranks)
        warn(self._ranks, *differences(loaded), *conversions(loaded, source.manifest))

    def _model(self, ignored: Collection[str] = ()) -> StateTree:
        others = {*self._not_model, *ignored}
        return StateTree({MODEL: self._whole_model}, flat=MODEL, others=others)


def say(ranks: Ranks, line: str) -> None:
    """Log a line on rank 0."""
    if ranks.rank == 0:
        logger.info(line)


def warn(ranks: Ranks, *lines: str) -> None:
    """Log warnings on rank 0."""
    for line in lines if ranks.rank == 0 else ():
        logger.warning(line)
