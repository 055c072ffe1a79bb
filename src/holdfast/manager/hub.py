"""What of a run comes from Hugging Face's folders, and what becomes one."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.errors import UsageError
from holdfast.format.names import step_name
from holdfast.hf.export import ExportSnapshot, HFModel, export
from holdfast.hf.load import load_folder
from holdfast.loading.load import Loaded
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.parts import differences
from holdfast.saving.planner import Planner
from holdfast.saving.save import Pending
from holdfast.spelling import rate
from holdfast.state.objects import StateTree
from holdfast.storage.opening import folder_store

logger: logging.Logger = logging.getLogger("holdfast")

FOLDER = "hf"
"""Of exports at an interval, below that of the steps."""

Use = Literal["step", "beside", "alone"]
"""The step itself is a Hugging Face folder; there is one beside it; there is one and no step."""


class Hub:
    """A run's way to and from Hugging Face. Collective: every rank makes one and calls alike."""

    def __init__(
        self,
        model: HFModel | None,
        config: CheckpointConfig,
        catalog: Catalog,
        ranks: Ranks,
        sections: Collection[str],
    ) -> None:
        """`catalog` is that of the steps, `sections` the top-level names that are not the model's.

        Raises:
            UsageError: the settings ask for what needs to know the model, and it is not given.
        """
        self._model, self._config, self._ranks = model, config, ranks
        self._sections = sections
        self._above = catalog.store.url
        self.planner: Planner = Planner(ranks)
        if model is None and (config.last_save_in_hf or config.hf_export_interval):
            raise UsageError(
                "Hugging Face folders need to know the model: its `config.json`",
                hint="`hub=HFModel(config, assets)` of CheckpointManager",
            )

    @cached_property
    def catalog(self) -> Catalog:
        """Exports at an interval, in a folder of their own below that of the steps."""
        return Catalog(folder_store(f"{self._above}/{FOLDER}"))

    @property
    def config(self) -> Mapping[str, Any]:
        """What the `config.json` of the model says; nothing where it is not known."""
        return {} if self._model is None else self._model.config

    def use(self, step: int, *, last_step: bool, saved: bool) -> Use | None:
        """What of this step is to be a Hugging Face folder; `saved`: it is saved as a step too."""
        if last_step and self._config.last_save_in_hf:
            return "step"
        interval = self._config.hf_export_interval
        if not interval or step % interval:
            return None
        return "beside" if saved else "alone"

    def load(self, path: str | None, tree: StateTree) -> Loaded:
        """Load the model from `path`, or from the assets."""
        known = self._model
        found = path or (known.assets if known is not None else None)
        if found is None:
            raise UsageError(
                "`checkpoint.initial_load_in_hf` needs a Hugging Face folder",
                hint="--checkpoint.initial_load_path FOLDER, or --model.hf_assets_path FOLDER",
            )
        config = known.config if known is not None else None
        partial = not self._config.initial_load_strict
        loaded, notes = load_folder(
            found, tree, ranks=self._ranks, config=config, partial_load=partial
        )
        quantized = any("dequantized" in note for note in notes)
        if self._config.initial_load_in_hf_quantized and not quantized:
            notes = (*notes, "`initial_load_in_hf_quantized` is set, and no tensor is quantized")
        for note in notes if self._ranks.rank == 0 else ():
            logger.info("%s: %s", loaded.where, note)
        for line in differences(loaded) if self._ranks.rank == 0 else ():
            logger.warning(line)
        return loaded

    def prepare(self) -> None:
        """Make the folder of exports ready. Collective."""

        def make() -> None:
            store = self.catalog.store
            store.make_folder("")
            execute(store, plan_cleanup(store.list()))

        run_on_rank_0(self._ranks, make)

    def finish(self, pending: Pending, ranks: Ranks, step: int, use: Use) -> int:
        """Write the model of a save as a Hugging Face folder, and publish it. Returns its bytes.
        Collective, over ranks that nothing else uses in the meantime."""
        assert self._model is not None, "checked at birth"
        started = time.perf_counter()
        catalog, attempt = pending.catalog, pending.attempt
        if use == "beside":
            catalog = self.catalog
            attempt = run_on_rank_0(
                ranks, lambda: self.catalog.begin(step_name(step), replace=True)
            )
        made = export(
            ExportSnapshot(pending.file_layout, pending.data_of, pending.index, self._sections),
            self._model,
            self._config.export_dtype,
            catalog=catalog,
            attempt=attempt,
            ranks=ranks,
        )
        if ranks.rank == 0:
            done = rate(made.nbytes, time.perf_counter() - started)
            where = catalog.where(attempt.name)
            logger.info("saved step %d for Hugging Face: %s, %s", step, done, where)
            if made.lost:
                more = f" and {len(made.lost) - 1} more" if len(made.lost) > 1 else ""
                logger.warning(
                    "%s is without `%s`%s, which balance experts and are not zero: the hub has no "
                    "place for them, so experts are chosen otherwise there",
                    *(where, made.lost[0], more),
                )
        return made.nbytes
