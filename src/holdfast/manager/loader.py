"""Loads what a run starts from: a checkpoint of its folder, or weights from elsewhere."""

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
from holdfast.format.names import step_of
from holdfast.loading.load import load_tree
from holdfast.loading.opening import open_in
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.goodput import Goodput
from holdfast.manager.hub import Hub
from holdfast.manager.parts import (
    DATALOADER,
    MODEL,
    RNG,
    check_dataloader,
    converted,
    differences,
    left_alone,
    not_excluded,
    other_generators,
    way_on,
)
from holdfast.manager.renames import as_here
from holdfast.manager.resume import ResumableStep
from holdfast.manager.resuming import Resuming
from holdfast.manager.retention import Retainer
from holdfast.spelling import rate
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree

logger: logging.Logger = logging.getLogger("holdfast")


class Loader:
    """Loads a run's components.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        config: CheckpointConfig,
        ranks: Ranks,
        components: Mapping[str, Any],
        whole: ModelState,
        hub: Hub,
        goodput: Goodput,
        retainer: Retainer,
        saves: bool,
    ) -> None:
        """`whole` is the model with all its parameters, frozen ones among them. `saves`: whether
        the run saves to the folder, too."""
        self._catalog, self._config, self._ranks = catalog, config, ranks
        self._components, self._whole = components, whole
        self._sections = [name for name in components if name != MODEL]
        self._names = not_excluded(components, config.exclude_from_loading)
        self._hub, self._goodput, self._retainer, self._saves = hub, goodput, retainer, saves

    def load(self, wanted: int) -> int:
        """Resume from step `wanted`, or from the newest where it is -1. Returns the step to go on
        from."""
        base = None if self._config.save_frozen else self._load_initial()
        resuming = Resuming(
            self._catalog, self._ranks, self._resume, partial(warn, self._ranks), self._saves
        )
        if wanted >= 0:
            try:
                return resuming.from_step(wanted)
            except UNREADABLE as error:
                newest = "`load_step = -1` takes the newest good checkpoint"
                error.hint = f"{error.hint}; {newest}" if error.hint else newest
                raise
        found, passed_over = resuming.from_newest()
        if found is not None:
            return found
        # Of what is trained, a step that proved damaged may have been read in part: no fresh start.
        start = self._load_initial() if self._config.save_frozen else None if passed_over else base
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

    def _resume(self, found: ResumableStep, explicit: bool) -> int:
        """Load a step of this folder, and remember the course that the run is on."""
        started = time.perf_counter()
        source = Source(self._catalog.store, found.folder, found.manifest)
        # A seed is step 0 too, and so is the first step of TorchTitan, which takes its model alone.
        whole = found.step > 0 or found.manifest.kind == "full"
        self._load_parts(source, self._names if whole else [MODEL], found.step)
        done = rate(found.manifest.nbytes, time.perf_counter() - started)
        say(self._ranks, f"resumed from step {found.step}: {done}, {source.url}")
        steps = run_on_rank_0(self._ranks, self._catalog.steps)
        left_behind = [step for step in steps if step > found.step]
        self._retainer.resumed(found.step, left_behind)
        if left_behind and self._saves and explicit:
            warn(
                self._ranks,
                f"steps {left_behind} are newer than step {found.step}: they stay, each until "
                "this run saves the same step, and `load_step = -1` takes the newest",
            )
        return found.step

    def _load_initial(self) -> int | None:
        """Load weights from elsewhere, if there are to be any. Returns the step to go on from."""
        path = self._config.initial_load_path
        then = ": starting at step 0" if self._config.save_frozen else ", to train in part"
        if self._config.initial_load_in_hf:
            loaded = self._hub.load(path, self._model())
            self._goodput.note_load(loaded, 0, self._ranks)
            say(self._ranks, f"loaded the model of {loaded.where}{then}")
            return 0
        if path is None:
            return None
        store, name = open_for_reading(path)
        opened = run_on_rank_0(self._ranks, lambda: open_in(store, name))
        manifest = as_here(opened.manifest, self._whole, self._config.initial_load_renames)
        source = Source(store, opened.name, manifest)
        if self._config.initial_load_model_only:
            partial_load = not self._config.initial_load_strict
            tree = self._model(left_alone(manifest, [MODEL]))
            self._load_tree(source, tree, 0, partial_load=partial_load)
            say(self._ranks, f"loaded the model of {source.url}{then}")
            return 0
        step = manifest.step if manifest.step is not None else step_of(name) or 0
        self._load_parts(source, self._names, step)
        say(self._ranks, f"loaded {source.url}: going on from step {step}")
        return step

    def _load_parts(self, source: Source, names: Sequence[str], step: int) -> None:
        manifest = source.manifest
        wanted = list(names)
        if RNG in wanted and (why := other_generators(manifest, self._ranks.size)):
            say(self._ranks, f"random number generators start afresh: {why}")
            wanted.remove(RNG)
        if DATALOADER in wanted:
            check_dataloader(manifest, self._ranks.size)
        parts = {part: self._components[part] for part in wanted}
        others = {*self._sections, *left_alone(manifest, names, self._config.exclude_from_loading)}
        self._load_tree(source, StateTree(parts, flat=MODEL, others=others), step)

    def _load_tree(
        self, source: Source, tree: StateTree, step: int, *, partial_load: bool = False
    ) -> None:
        manifest = source.manifest
        replicas = self._config.load_replicas
        try:
            loaded = load_tree(
                source, tree, ranks=self._ranks, partial=partial_load, replicas=replicas
            )
        except (FormatError, MismatchError) as error:
            error.hint = way_on(error, self._sections) or error.hint
            raise
        self._goodput.note_load(loaded, step, self._ranks)
        warn(self._ranks, *differences(loaded))
        warn(self._ranks, *converted(loaded, manifest))

    def _model(self, beside: Collection[str] = ()) -> StateTree:
        others = {*self._sections, *beside}
        return StateTree({MODEL: self._whole}, flat=MODEL, others=others)


def say(ranks: Ranks, line: str) -> None:
    """Log a line on rank 0."""
    if ranks.rank == 0:
        logger.info(line)


def warn(ranks: Ranks, *lines: str) -> None:
    """Log warnings on rank 0."""
    for line in lines if ranks.rank == 0 else ():
        logger.warning(line)
