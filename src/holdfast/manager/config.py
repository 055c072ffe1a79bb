"""The `[checkpoint]` section of the configuration, with TorchTitan's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from holdfast.arguments import checked_path, nearest, settings, shown
from holdfast.errors import UsageError
from holdfast.format.names import STEP_MAX
from holdfast.manager.renames import KEY
from holdfast.manager.signals import check_names
from holdfast.tensors.renames import parse

_ZERO_IS_OFF = (
    "interval_minutes",
    "write_bandwidth_limit",
    "deduplicate_check_every",
    "keep_every_n_steps",
    "keep_best_k",
    "hf_export_interval",
)


@settings("checkpoint")
@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """When to save, what to keep, and what to start from."""

    enable: bool = False
    """Save checkpoints, and resume from them."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, below `job.dump_folder`, or a URL in an object store."""

    interval: int | Literal["auto"] = 500
    """Steps between saves. `auto` computes it from the duration of a save, the duration of a step
    and `mtbf_hours`."""

    interval_minutes: float = 0.0
    """Minutes since the last save after which a save is due, in addition to `interval`. 0 turns
    this off."""

    mtbf_hours: float = 24.0
    """Mean time between failures of the whole job, in hours, for `interval = "auto"`."""

    min_interval: int = 10
    """Smallest number of steps between saves with `interval = "auto"`."""

    max_interval: int = 5000
    """Largest number of steps between saves with `interval = "auto"`."""

    load_step: int = -1
    """Step to resume from. If its checkpoint cannot be loaded, the run ends with an error. -1 takes
    the newest good checkpoint. If step 0 is a seed checkpoint or a stock checkpoint, the run loads
    only its model."""

    initial_load_path: str | None = None
    """Path or URL of a checkpoint to start from while `folder` has no good checkpoint."""

    initial_load_model_only: bool = True
    """Load only the model from `initial_load_path`, and start at step 0."""

    initial_load_strict: bool = True
    """Refuse initial weights with missing tensors, unexpected tensors or other shapes. Off: these
    tensors keep their values, and the log lists them."""

    initial_load_renames: tuple[str, ...] = ()
    """Renames of tensors in `initial_load_path`, each as `theirs=ours`. A rename replaces the
    beginning of a name. `{}` matches one part of a name, without dots."""

    initial_load_in_hf: bool = False
    """Start from a Hugging Face folder: `initial_load_path`, or by default
    `model.hf_assets_path`."""

    initial_load_in_hf_quantized: bool = False
    """Declare that the Hugging Face folder to start from is quantized; if it is not, the log says
    so. Quantized folders are recognized and dequantized in any case."""

    save_frozen: bool = True
    """Save frozen parameters (`requires_grad` is false) too, such as the base model below adapters.
    Off: checkpoints leave them out, and every start loads them from `initial_load_path` before it
    resumes."""

    last_save_model_only: bool = True
    """Write the last checkpoint with the model only, in `export_dtype`."""

    last_save_in_hf: bool = False
    """Write the last checkpoint as a Hugging Face folder, which transformers can load directly."""

    hf_export_interval: int = 0
    """Steps between Hugging Face exports of the model, in `hf/step-N` below `folder`. Retention
    never deletes them. 0 turns exports off."""

    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Dtype of floating-point tensors in a model-only last checkpoint and in Hugging Face
    exports."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Mode of a save, by the part of it that training waits for. `disabled`: all, until the
    checkpoint is durable. `async`: a copy of the state in host memory, from which the checkpoint is
    written in the background. `async_with_pinned_mem`: almost nothing. The copy is made during the
    next forward and backward pass, and optimizers wait for it before they step."""

    on_save_overlap: Literal["wait", "skip", "queue"] = "wait"
    """Action if a save is due while the previous one is being written. `wait`: training waits.
    `skip`: the save is skipped. `queue`: the step reached when the previous save has ended is
    saved."""

    on_low_memory: Literal["raise", "wait"] = "raise"
    """Action if host memory is too small for the copy of `async_mode`. `raise`: an error. `wait`:
    training waits for the durable checkpoint, as with `disabled`."""

    write_bandwidth_limit: float = 0.0
    """Limit on the MB/s that all ranks together write, for file systems that other jobs use too. 0:
    no limit."""

    files: Literal["rank", "node"] = "rank"
    """Data files of a checkpoint: one for each `rank`, or one for each `node`, which the ranks of a
    host write together. `node` suits many ranks on a parallel file system, and does not work with
    an object store."""

    deduplicate: bool = False
    """Link the files of tensors that have not changed since an earlier checkpoint, instead of
    writing them again. For a frozen base model, or experts that are seldom trained. Needs hard
    links; an object store copies the files instead. Two consecutive checkpoints share no file, so
    each tensor is stored twice."""

    deduplicate_check_every: int = 20
    """Number of saves that link a file before the file is read and compared with its checksums. If
    it is damaged, the save writes its tensors again. 0: files are never read."""

    local_folder: str | None = None
    """Folder on a disk of each host, or in its memory, for frequent saves: the fast tier. The name
    of the host replaces `{host}`. `interval` then selects the checkpoints that are copied from
    there to `folder`, in the background, within `write_bandwidth_limit`."""

    local_interval: int = 50
    """Steps between saves to `local_folder`."""

    local_replicas: int = 0
    """Number of other hosts that keep a copy of each host's files in their `local_folder`: 0 or 1.
    With 1, a run can resume from `local_folder` after the loss of any single host."""

    keep_latest_k: int = 10
    """Number of newest good checkpoints to keep. 0 keeps all. 1 is refused, since one damaged file
    could then end the run."""

    keep_every_n_steps: int = 0
    """Keep all checkpoints whose step is a multiple of this number, in addition to other rules. 0
    turns this rule off."""

    keep_best_k: int = 0
    """Number of checkpoints with the best metric to keep, in addition to other rules. 0 turns this
    rule off."""

    keep_best_metric: str = "loss"
    """Metric for `keep_best_k`: a name that the training loop passes to `save`."""

    keep_best_mode: Literal["min", "max"] = "min"
    """Best value of the metric: the smallest (`min`) or the largest (`max`)."""

    exclude_from_loading: tuple[str, ...] = field(default=())
    """Components that a resume leaves as they are: `optimizer`, `lr_scheduler`, `dataloader`,
    `train_state`, `rng`, or names of `states`."""

    load_replicas: Literal["auto", "read", "broadcast"] = "auto"
    """How ranks load data that several of them need. `read`: each rank reads it. `broadcast`: one
    rank reads and checks it, and sends it to the others. `auto`: `broadcast` for a URL or for ranks
    on several hosts, else `read`, since the ranks of one host share its page cache."""

    enable_first_step_checkpoint: bool = False
    """Also save after step 1, to see early that saving works."""

    create_seed_checkpoint: bool = False
    """Save the initial weights of the whole model as step 0, from one CPU process, and end. Runs
    with any parallelism can start from these weights."""

    load_only: bool = False
    """Resume, but never save."""

    on_save_error: Literal["raise", "warn"] = "raise"
    """Action after a failed save. `raise`: it ends the run. `warn`: it is logged, and the run
    continues."""

    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGINT", "SIGUSR1")
    """Signals to any rank after which the run saves one checkpoint and ends."""

    stop_deadline_s: float = 30.0
    """Seconds from a stop signal until the process is killed. If a full save takes longer than the
    time left, the run saves only the model, or nothing."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Make the settings from a mapping, such as the `[checkpoint]` section of a TOML file.

        Raises:
            UsageError: `mapping` is not a mapping, a key is unknown, or a value has the wrong type.
                The message names the key.
        """
        if not isinstance(mapping, Mapping):
            raise UsageError(
                f"the settings must be a mapping of keys to values, found: {shown(mapping)}"
            )
        unknown = [key for key in mapping if key not in cls.__dataclass_fields__]
        if unknown:
            raise UsageError(
                f"`{unknown[0]}` is no key of the section `[checkpoint]`",
                hint=nearest(str(unknown[0]), cls.__dataclass_fields__)
                or "docs/configuration.md lists all keys",
            )
        return cls(**mapping)

    def __post_init__(self) -> None:
        self._check_numbers()
        checked_path(self.folder, "checkpoint.folder")
        if self.initial_load_path is not None:
            checked_path(self.initial_load_path, "checkpoint.initial_load_path")
        if self.local_folder is not None:
            checked_path(self.local_folder, "checkpoint.local_folder")
            if self.deduplicate:
                # No file would be linked, since the copy from the fast tier writes every byte.
                raise UsageError(
                    "`checkpoint.deduplicate` links files in `checkpoint.folder`, and does not "
                    "work with `checkpoint.local_folder`",
                    hint="--checkpoint.no-deduplicate",
                )
        if self.deduplicate and self.files == "node":
            raise UsageError(
                "`checkpoint.deduplicate` links files of a single rank, and does not work with "
                '`checkpoint.files = "node"`',
                hint="--checkpoint.files rank",
            )
        self._check_hf()
        self._check_frozen()
        check_names(self.stop_signals)
        if self.create_seed_checkpoint and (self.load_only or not self.enable):
            obstacle = "load_only` is on" if self.load_only else "enable` is off"
            raise UsageError(
                f"`checkpoint.create_seed_checkpoint` saves a step, but `checkpoint.{obstacle}",
                hint="--checkpoint.enable --checkpoint.no-load_only",
            )
        if "model" in self.exclude_from_loading:
            raise UsageError(
                "`checkpoint.exclude_from_loading` has `model`, without which nothing is resumed",
                hint="to start with fresh weights, use another `checkpoint.folder`",
            )

    def _check_numbers(self) -> None:
        if self.interval != "auto" and self.interval < 1:
            raise UsageError(
                f'`checkpoint.interval` must be at least 1 step, or "auto", found: {self.interval}'
            )
        if self.local_interval < 1:
            raise UsageError(
                f"`checkpoint.local_interval` must be at least 1 step, found: {self.local_interval}"
            )
        if self.local_replicas not in (0, 1):
            raise UsageError(
                f"`checkpoint.local_replicas` must be 0 or 1, found: {self.local_replicas}"
            )
        if not 1 <= self.min_interval <= self.max_interval:
            raise UsageError(
                "`checkpoint.min_interval` must be at least 1, and at most "
                f"`checkpoint.max_interval`, found: {self.min_interval} and {self.max_interval}"
            )
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            raise UsageError(
                "`checkpoint.keep_latest_k` must be 0 (keep all) or at least 2, found: "
                f"{self.keep_latest_k}",
                hint="with a single checkpoint, one damaged file would end the run: use 2 or more",
            )
        if not -1 <= self.load_step <= STEP_MAX:
            raise UsageError(
                "`checkpoint.load_step` must be -1 (the newest good step) or a step, found: "
                f"{self.load_step}"
            )
        for key in ("mtbf_hours", "stop_deadline_s"):
            if getattr(self, key) <= 0:
                raise UsageError(f"`checkpoint.{key}` must be above 0, found: {getattr(self, key)}")
        for key in _ZERO_IS_OFF:
            if getattr(self, key) < 0:
                raise UsageError(
                    f"`checkpoint.{key}` must be 0 (off) or above, found: {getattr(self, key)}"
                )

    def _check_frozen(self) -> None:
        """If `save_frozen` is off, raise a UsageError for settings that do not work without it."""
        for key in ("last_save_in_hf", "hf_export_interval", "create_seed_checkpoint"):
            if getattr(self, key) and not self.save_frozen:
                raise UsageError(
                    f"`checkpoint.{key}` writes a whole model, but `checkpoint.save_frozen` is off"
                )
        if not self.save_frozen and not self.initial_load_model_only:
            raise UsageError(
                "`checkpoint.save_frozen` is off: each start loads the model alone from "
                "`initial_load_path`, but `checkpoint.initial_load_model_only` is off",
                hint="--checkpoint.initial_load_model_only",
            )

    def _check_hf(self) -> None:
        for key, needed in (
            ("last_save_in_hf", "last_save_model_only"),
            ("initial_load_in_hf", "initial_load_model_only"),
            ("initial_load_in_hf_quantized", "initial_load_in_hf"),
        ):
            if getattr(self, key) and not getattr(self, needed):
                raise UsageError(
                    f"`checkpoint.{key}` is on, and needs `checkpoint.{needed}`, which is off",
                    hint=f"--checkpoint.{needed}",
                )
        for rule in self.initial_load_renames:
            parse(rule, KEY)
        if self.initial_load_renames and self.initial_load_in_hf:
            raise UsageError(
                "`checkpoint.initial_load_renames` does not apply to Hugging Face folders, whose "
                "tensor names are known"
            )
