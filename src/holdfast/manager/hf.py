"""Loads the model of a run from a Hugging Face folder, and exports it to such folders."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.findings import named
from holdfast.catalog.hf_folder import of_language_model
from holdfast.comm import Ranks, capture, run_on_all, run_on_rank_0
from holdfast.errors import MismatchError, UsageError
from holdfast.format.components import MODEL, OUTER_WRAPPER, WRAPPERS
from holdfast.format.names import step_name
from holdfast.hf.export import ExportSnapshot, HFModel, check_live, export
from holdfast.hf.load import load_folder
from holdfast.hf.own_names import check_no_adapters
from holdfast.hf.values import no_class, untrained_positions, value_differences
from holdfast.loading.load import Loaded
from holdfast.manager.components import differences
from holdfast.manager.context import RunContext
from holdfast.manager.initial import check_matched
from holdfast.saving.planner import Planner
from holdfast.saving.save import Pending
from holdfast.spelling import rate
from holdfast.state.model import ModelState
from holdfast.state.objects import StateTree
from holdfast.state.subclass import UNINITIALIZED
from holdfast.storage.opening import folder_store, is_url

FOLDER = "hf"
"""Folder of the exports of `hf_export_interval`, below the folder of the checkpoints."""

_INNER = (*WRAPPERS, OUTER_WRAPPER)
"""Names under which wrapper modules hold the module that they wrap."""

Export = Literal["as_step", "beside", "alone"]
"""Place of an export. `as_step`: the folder `step-N`, in place of a checkpoint. `beside`: a folder
below `FOLDER`, in addition to a checkpoint of the step. `alone`: a folder below `FOLDER`, for a
step that has no checkpoint."""


def _with_class(model: HFModel, live: Sequence[nn.Module]) -> HFModel:
    """If the configuration of `model` has no class name, and the live model is of transformers,
    return `model` with the class name of the live model. Else return `model` unchanged. `live`:
    this rank's modules of the live model.

    Loaders choose the class by the key `architectures`, which transformers adds to a configuration
    only in `save_pretrained`.
    """
    names = [name for part in live if (name := _class_of(part))]
    if model.config.get("architectures") or not model.config.get("model_type") or not names:
        return model
    return replace(model, config={**model.config, "architectures": names[:1]})


def _class_of(module: nn.Module) -> str | None:
    """Return the class name of a transformers model, also if wrapper modules hold it; None for
    other models."""
    while (inner := next((m for n, m in module.named_children() if n in _INNER), None)) is not None:
        module = inner
    # FSDP replaces the class of a module by a subclass whose name begins with `FSDP`.
    classes = [kind for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP")]
    if not any(kind.__name__ == "PreTrainedModel" for kind in classes):
        return None
    return classes[0].__name__


def _is_without_memory(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, UNINITIALIZED)


class HFFormat:
    """Reads and writes the model in Hugging Face format.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self, run: RunContext, model: HFModel | None, live: Sequence[nn.Module] = ()
    ) -> None:
        """`model`: description of the model for exports. `live`: this rank's modules of the model.

        Raises:
            UsageError: the settings ask for exports, but `model` is None, the live model has
                adapters, or the run saves to an object store.
        """
        self._run, self._config, self._ranks = run, run.config, run.ranks
        self._model = None if model is None else _with_class(model, live)
        self.planner: Planner = Planner(run.ranks)
        if not run.config.last_save_in_hf and not run.config.hf_export_interval:
            return
        url = run.catalog.store.url
        if is_url(url):
            raise UsageError(
                "the ranks write each file of a Hugging Face folder together, which the object "
                f"store `{url}` does not allow",
                hint="set `last_save_in_hf = false` and `hf_export_interval = 0`, then run "
                f"`holdfast convert {url}/step-N {url}/TARGET --to hf`",
            )
        if model is None:
            raise UsageError(
                "Hugging Face folders need to know the model: its `config.json`",
                hint="`hub=holdfast.hf.export.HFModel(config, assets)` of CheckpointManager",
            )
        # Checked now, since the first export would fail only after hours of training.
        names = [name for part in live for name, _ in part.named_parameters()]
        run_on_all(run.ranks, lambda: check_no_adapters(names))

    def check_live(self, model: ModelState) -> None:
        """If the settings ask for exports, check that the live model can be exported, since the
        first export would fail only after hours of training. Skip the check if tensors of the model
        have no memory yet, such as those on the meta device. Collective.

        Raises:
            MismatchError: the model has other tensors than its configuration describes.
        """
        exports = self._config.last_save_in_hf or self._config.hf_export_interval
        if self._model is None or not exports:
            return
        tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
        if self._ranks.all_reduce_max([any(map(_is_without_memory, tensors))])[0]:
            return
        tree, known = StateTree({MODEL: model}, flat=MODEL), self._model
        self.planner.agree(capture(lambda: self.planner.hold(tree.flatten(), None)))

        def check() -> None:
            assert self.planner.index is not None, "rank 0 has it"
            check_live(self.planner.index.plan, self._run.others, known)

        run_on_rank_0(self._ranks, check)

    @cached_property
    def catalog(self) -> Catalog:
        """`Catalog` of the folder that holds the exports of `hf_export_interval`."""
        above = self._run.catalog
        catalog = Catalog(folder_store(f"{above.store.url}/{FOLDER}"))
        # `above.check_lock` is set only when the run locks its folder, so read it at each call.
        catalog.check_lock = lambda: above.check_lock()
        return catalog

    @property
    def config(self) -> Mapping[str, Any]:
        """Contents of the model's `config.json`; empty if unknown."""
        return {} if self._model is None else self._model.config

    def export_at(self, step: int, *, last_step: bool, saved: bool) -> Export | None:
        """Return the place of this step's export; None if no export is due. `saved`: whether a
        checkpoint of the step is saved too."""
        if last_step and self._config.last_save_in_hf:
            return "as_step"
        interval = self._config.hf_export_interval
        if not interval or step % interval:
            return None
        return "beside" if saved else "alone"

    def check_values(self, config: Mapping[str, Any], where: str) -> None:
        """Compare `config`, the configuration of the weights at `where`, with that of the run's
        model. Log a warning for each value that differs, such as `rope_theta`.

        Raises:
            MismatchError: values differ, and `HFModel.exact` is set. The message lists all
                differences.
        """
        lines = value_differences(of_language_model(config), of_language_model(self.config))
        if not lines or self._model is None:
            return
        if self._model.exact:
            raise MismatchError(
                f"`{where}` was trained with other values than this run has (the second of each):"
                "\n  " + "\n  ".join(lines),
                hint="set `model.hf_assets_path` to a folder with the `config.json` of these "
                "weights; to change a value on purpose, `holdfast convert --model-only --hf-assets "
                "FOLDER` makes a new start with the `config.json` there",
            )
        for line in lines:
            self._run.warn(f"{where} was trained with another value: {line}")

    def load(self, path: str | None, tree: StateTree) -> Loaded:
        """Load the model in `tree` from the Hugging Face folder `path`; None: `HFModel.assets`."""
        model = self._model
        folder = path or (model.assets if model is not None else None)
        if folder is None:
            raise UsageError(
                "`checkpoint.initial_load_in_hf` needs a Hugging Face folder",
                hint="--checkpoint.initial_load_path FOLDER, or --model.hf_assets_path FOLDER",
            )
        loaded, notes = load_folder(
            folder,
            tree,
            ranks=self._ranks,
            config=model.config if model is not None else None,
            partial_load=not self._config.initial_load_strict,
            check_config=self.check_values,
        )
        if not self._config.initial_load_strict:
            check_matched(
                loaded,
                self._ranks,
                hint=f"`holdfast show {loaded.where}` lists the names there; `holdfast convert "
                f"{loaded.where} RENAMED --to hf --rename 'THEIRS=OURS'` changes them",
            )
        quantized = any("dequantized" in note for note in notes)
        if self._config.initial_load_in_hf_quantized and not quantized:
            notes = (*notes, "`initial_load_in_hf_quantized` is set, and no tensor is quantized")
        for note in notes:
            self._run.info(f"{loaded.where}: {note}")
        self._run.warn(*differences(loaded))
        return loaded

    def prepare(self) -> None:
        """Create the folder of the exports, if there is none, and clean it up. Collective."""

        def make() -> None:
            store = self.catalog.store
            store.make_folder("")
            execute(store, plan_cleanup(store.list()))

        run_on_rank_0(self._ranks, make)

    def export(self, pending: Pending, ranks: Ranks, step: int, place: Export) -> int:
        """Write the model of the save `pending` as a Hugging Face folder, and publish the folder at
        `place`. Returns the number of bytes of its tensors.

        Collective. Nothing else may use `ranks` in the meantime.
        """
        assert self._model is not None, "checked by the constructor"
        started = time.perf_counter()
        catalog, attempt = pending.catalog, pending.attempt
        if place == "beside":
            catalog = self.catalog
            attempt = run_on_rank_0(
                ranks, lambda: self.catalog.begin(step_name(step), replace=True)
            )
        others = self._run.others
        exported = export(
            ExportSnapshot(pending.file_layout, pending.data_of, pending.index, others),
            self._model,
            self._config.export_dtype,
            catalog=catalog,
            attempt=attempt,
            ranks=ranks,
        )
        speed = rate(exported.nbytes, time.perf_counter() - started)
        where, lost = catalog.where(attempt.name), exported.lost
        self._run.info(f"saved step {step} for Hugging Face: {speed}, {where}")
        config = of_language_model(self._model.config)
        for note in (
            exported.note,
            untrained_positions(config, self._model.seq_len),
            no_class(self._model.config),
        ):
            if note:
                self._run.info(f"{where}: {note}")
        if exported.infinite:
            self._run.warn(
                f"{where}: {named(exported.infinite)} have numbers that are too large for "
                f"{self._config.export_dtype}, and are infinite in the export"
            )
        if exported.untied:
            self._run.warn(
                f"{where}: `{exported.untied}` is a tensor of its own in the model, and "
                f"`config.json` ties it: loaders that follow `config.json` use the embedding for it"
            )
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            self._run.warn(
                f"{where} is without `{lost[0]}`{more}, which balance experts and are not zero: "
                "the format has no tensors for them, so the exported model routes differently"
            )
        return exported.nbytes
