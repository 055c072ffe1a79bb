"""The `[checkpoint]` section: TorchTitan's keys, with their meaning and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from holdfast.arguments import checked_path, settings
from holdfast.errors import UsageError
from holdfast.format.names import STEP_MAX
from holdfast.manager.renames import parse
from holdfast.manager.signals import check_names

DATALOADER_KEYS = ("dataloader", "data_loader")
"""Two spellings of one key, both in use among TorchTitan's users."""


@settings("checkpoint")
@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """When to save, what to keep, where to resume from."""

    enable: bool = False
    """Save checkpoints and resume from them."""

    folder: str = "checkpoint"
    """Where the steps lie, below `job.dump_folder`."""

    interval: int | Literal["auto"] = 500
    """Steps between saves. `auto`: by what a save costs, what a step takes, and `mtbf_hours`."""

    interval_minutes: float = 0.0
    """Save, besides, when so many minutes have passed since the last save; 0: never for that."""

    mtbf_hours: float = 24.0
    """Mean time between failures of the whole job: what `interval = "auto"` weighs a save against.
    """

    min_interval: int = 10
    """Steps that `interval = "auto"` leaves between saves at least."""

    max_interval: int = 5000
    """Steps that `interval = "auto"` leaves between saves at most."""

    load_step: int = -1
    """-1: the newest good step. A number: that step or an error. A seed or a stock checkpoint
    at step 0 loads the model only."""

    initial_load_path: str | None = None
    """Checkpoint to start from while `folder` holds no good step."""

    initial_load_model_only: bool = True
    """Take the model alone from `initial_load_path`, and start at step 0."""

    initial_load_strict: bool = True
    """Refuse weights to start from that lack some of the model's, have others, or other shapes.
    Off: what does not fit stays as it is, and the log lists all of it."""

    initial_load_renames: tuple[str, ...] = ()
    """Names of tensors in `initial_load_path` and what they are here, each as `theirs=ours`:
    leading parts are replaced, `{}` stands for any one part."""

    initial_load_in_hf: bool = False
    """Start from a Hugging Face folder: `initial_load_path`, or else `model.hf_assets_path`."""

    initial_load_in_hf_quantized: bool = False
    """That folder is expected to be quantized; it is dequantized whether or not this is said."""

    save_frozen: bool = True
    """Off: steps leave out parameters that are frozen (`requires_grad` is false), such as the base
    beside adapters; every start loads those from `initial_load_path`, before it resumes."""

    last_save_model_only: bool = True
    """The last step holds the model alone, in `export_dtype`."""

    last_save_in_hf: bool = False
    """The last step is a Hugging Face folder, which transformers opens as it is."""

    hf_export_interval: int = 0
    """Steps between Hugging Face folders of the model, below `folder` in `hf`; all of them stay. 0:
    none."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of the floating-point tensors of a model-only last step, and of Hugging Face's."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """`disabled`: training waits for the step to be durable. `async`: it waits for a copy of the
    state in host memory, and goes on while that is written. `async_with_pinned_mem`: it goes on at
    once; the copy is made during the next forward and backward, and the optimizers wait for it."""

    on_save_overlap: Literal["wait", "skip", "queue"] = "wait"
    """What happens to a save that is due while the one before it is being written: training waits
    for that; or this one is left out; or it is made once that is done, of the step then reached."""

    on_low_memory: Literal["raise", "wait"] = "raise"
    """Where there is no host memory for the copy that `async_mode` needs: an error, or training
    waits for the step to be durable, as with `disabled`."""

    write_bandwidth_limit: float = 0.0
    """MB/s that all ranks together write at most, for file systems that others share; 0: no limit.
    """

    keep_latest_k: int = 10
    """How many of the newest good steps to keep; 0 keeps all. 1 is refused: one damaged file would
    be the end."""

    keep_every_n_steps: int = 0
    """Keep, besides, each step whose number this divides; 0: none."""

    keep_best_k: int = 0
    """Keep, besides, this many steps with the best metric; 0: none."""

    keep_best_metric: str = "loss"
    """The metric: one of those that the training loop passes to `save`."""

    keep_best_mode: Literal["min", "max"] = "min"
    """Whether the least or the greatest metric is the best."""

    exclude_from_loading: tuple[str, ...] = field(default=())
    """What a resume leaves as it is: `optimizer`, `lr_scheduler`, `dataloader`, ..."""

    load_replicas: Literal["auto", "read", "broadcast"] = "auto"
    """What several ranks want alike, such as copies of weights: `read`: each reads it for itself.
    `broadcast`: one of them reads and checks it, and passes it on over the network. `auto`:
    `broadcast` for a URL or ranks on several hosts, else `read`: one page cache serves a host."""

    enable_first_step_checkpoint: bool = False
    """Save after step 1 too, to see at once that saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights of the whole model as step 0, from one CPU process, and end. Any
    layout starts from them."""

    load_only: bool = False
    """Resume, but never save."""

    on_save_error: Literal["raise", "warn"] = "raise"
    """What a save that fails does to the run: end it, or let it go on to the next save."""

    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """Signals to any rank after which the next step is saved and the run ends."""

    stop_deadline_s: float = 30.0
    """Seconds from such a signal until the process is killed. Where a save takes longer than is
    left, the model alone is saved, or nothing."""

    def __post_init__(self) -> None:
        if self.interval != "auto" and self.interval < 1:
            raise UsageError(
                f'`checkpoint.interval` is a number of steps from 1 on, or "auto": {self.interval}'
            )
        if not 1 <= self.min_interval <= self.max_interval:
            raise UsageError(
                "`checkpoint.min_interval` is at least 1, and at most `checkpoint.max_interval`: "
                f"{self.min_interval} and {self.max_interval}"
            )
        if self.mtbf_hours <= 0:
            raise UsageError(f"`checkpoint.mtbf_hours` is a number of hours: {self.mtbf_hours}")
        for key in ("interval_minutes", "write_bandwidth_limit"):
            if getattr(self, key) < 0:
                raise UsageError(f"`checkpoint.{key}` is 0 (off) or a number: {getattr(self, key)}")
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            raise UsageError(
                f"`checkpoint.keep_latest_k` is 0 (keep all) or at least 2: {self.keep_latest_k}",
                hint="with a single step kept, one damaged file would end the run: use 2 or more",
            )
        for key in ("keep_every_n_steps", "keep_best_k"):
            if getattr(self, key) < 0:
                raise UsageError(f"`checkpoint.{key}` is 0 (off) or a number: {getattr(self, key)}")
        if not -1 <= self.load_step <= STEP_MAX:
            raise UsageError(
                "`checkpoint.load_step` must be -1 (the newest good step) or a step, found: "
                f"{self.load_step}"
            )
        checked_path(self.folder, "checkpoint.folder")
        if self.initial_load_path is not None:
            checked_path(self.initial_load_path, "checkpoint.initial_load_path")
        self._check_hf()
        self._check_frozen()
        check_names(self.stop_signals)
        if self.stop_deadline_s <= 0:
            raise UsageError(
                f"`checkpoint.stop_deadline_s` is a number of seconds: {self.stop_deadline_s}"
            )
        if self.create_seed_checkpoint and (self.load_only or not self.enable):
            hindrance = "load_only` is on" if self.load_only else "enable` is off"
            raise UsageError(
                f"`checkpoint.create_seed_checkpoint` saves a step, but `checkpoint.{hindrance}",
                hint="--checkpoint.enable --checkpoint.no-load_only",
            )
        if "model" in self.exclude_from_loading:
            raise UsageError(
                "`checkpoint.exclude_from_loading` holds `model`, without which nothing is resumed",
                hint="to start with fresh weights, use another `checkpoint.folder`",
            )

    def _check_frozen(self) -> None:
        """Steps without a base are for this run alone: what needs a whole model is refused."""
        whole = ("last_save_in_hf", "hf_export_interval", "create_seed_checkpoint")
        asked = [key for key in whole if getattr(self, key) and not self.save_frozen]
        if asked:
            raise UsageError(
                f"`checkpoint.{asked[0]}` writes a whole model, but `checkpoint.save_frozen` is off"
            )
        if not self.save_frozen and not self.initial_load_model_only:
            raise UsageError(
                "`checkpoint.save_frozen` is off: each start loads the model alone from "
                "`initial_load_path`, but `checkpoint.initial_load_model_only` is off",
                hint="--checkpoint.initial_load_model_only",
            )

    def _check_hf(self) -> None:
        if self.hf_export_interval < 0:
            raise UsageError(
                f"`checkpoint.hf_export_interval` is 0 (none) or a number of steps: "
                f"{self.hf_export_interval}"
            )
        if self.last_save_in_hf and not self.last_save_model_only:
            raise UsageError(
                "`checkpoint.last_save_in_hf` saves the model alone, but "
                "`checkpoint.last_save_model_only` is off",
                hint="--checkpoint.last_save_model_only",
            )
        for rule in self.initial_load_renames:
            parse(rule)
        if self.initial_load_renames and self.initial_load_in_hf:
            raise UsageError(
                "`checkpoint.initial_load_renames` is not for Hugging Face folders, whose names "
                "are known by their family"
            )
        if self.initial_load_in_hf and not self.initial_load_model_only:
            raise UsageError(
                "`checkpoint.initial_load_in_hf` loads the model alone, but "
                "`checkpoint.initial_load_model_only` is off",
                hint="--checkpoint.initial_load_model_only",
            )
        if self.initial_load_in_hf_quantized and not self.initial_load_in_hf:
            raise UsageError(
                "`checkpoint.initial_load_in_hf_quantized` is about a folder that "
                "`checkpoint.initial_load_in_hf` does not load",
                hint="--checkpoint.initial_load_in_hf",
            )
