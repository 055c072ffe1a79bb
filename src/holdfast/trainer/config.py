"""The settings of a training run, under TorchTitan's sections and keys.

Each class checks its values on construction. This module does not import torch, so that
`--help` and errors in the settings appear at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from holdfast.arguments import nearest, settings
from holdfast.errors import UsageError
from holdfast.hf.flavors import MODELS, Flavor
from holdfast.manager.config import CheckpointConfig


@settings("job")
@dataclass(frozen=True, slots=True)
class JobConfig:
    """Folder, description and configuration file of the run."""

    dump_folder: str = "./outputs"
    """Folder for everything that the run writes, relative to the current directory."""

    description: str = "training run"
    """Text for the first line of the log."""

    config_file: str | None = None
    """TOML file with any of these settings; the command line overrides it."""

    debug: bool = False
    """Show an error's traceback as well as its message."""


@settings("model")
@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Model to train."""

    name: Literal["llama3", "qwen3_moe"] = "llama3"
    """Model family. `qwen3_moe` has experts."""

    flavor: str = "debugmodel"
    """Size of the model. llama3: debugmodel, 1B, 3B, 8B, 70B or 405B. qwen3_moe: debugmodel,
    30B-A3B or 235B-A22B."""

    hf_assets_path: str | None = None
    """Hugging Face folder with the `tokenizer.json` and `config.json` of the model. Without a
    `tokenizer.json`, each byte of text is a token."""

    def __post_init__(self) -> None:
        known = MODELS[self.name]
        if self.flavor not in known:
            raise UsageError(
                f"`model.flavor` must be one of {', '.join(known)}, found: {self.flavor}",
                hint=nearest(self.flavor, known),
            )

    @property
    def shape(self) -> Flavor:
        """Sizes of the model named by `name` and `flavor`."""
        return MODELS[self.name][self.flavor]


@settings("training")
@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Data and length of the training."""

    dataset: str = "stdlib"
    """`stdlib`: the source files of Python's standard library.
    Otherwise a data set on the Hugging Face hub: `owner/name` or `owner/name:config`."""

    dataset_path: str | None = None
    """A .txt, .jsonl or .parquet file, or a folder of such files; overrides `dataset`."""

    local_batch_size: int = 8
    """Sequences in each forward pass of a data-parallel rank."""

    global_batch_size: int = -1
    """Sequences per step over all ranks, reached by accumulating gradients.
    -1: `local_batch_size` times the number of data-parallel ranks."""

    seq_len: int = 2048
    """Tokens in a sequence."""

    steps: int = 10000
    """Number of optimizer steps."""

    seed: int = 0
    """Seed of the initial weights and the data order; the number of workers changes neither."""

    deterministic: bool = False
    """Use only algorithms that give the same bits in every run; slower on a GPU."""

    max_norm: float = 1.0
    """Norm to which larger gradients are clipped; 0: no clipping."""

    def __post_init__(self) -> None:
        for key in ("local_batch_size", "seq_len", "steps"):
            _at_least_one(f"training.{key}", getattr(self, key))
        if self.global_batch_size != -1:
            _at_least_one("training.global_batch_size", self.global_batch_size)
        _not_negative("training.seed", self.seed)
        _not_negative("training.max_norm", self.max_norm)

    def batch_per_rank(self, dp_size: int) -> int:
        """Return how many sequences each of `dp_size` data-parallel ranks has per step."""
        if self.global_batch_size == -1:
            return self.local_batch_size
        unit = self.local_batch_size * dp_size
        if self.global_batch_size % unit:
            fitting = max(1, round(self.global_batch_size / unit)) * unit
            raise UsageError(
                f"`training.global_batch_size` must be a multiple of `training.local_batch_size` "
                f"{self.local_batch_size} x {dp_size} data-parallel ranks = {unit}, found: "
                f"{self.global_batch_size}",
                hint=f"the nearest multiple: --training.global_batch_size {fitting}",
            )
        return self.global_batch_size // dp_size


@settings("optimizer")
@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Optimizer and its hyperparameters."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """Class in `torch.optim`."""

    lr: float = 8e-4
    """Learning rate after the warm-up."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two running means."""

    beta1: float | None = None
    """Decay rate of Adam's first running mean; overrides the first of `betas`."""

    beta2: float | None = None
    """Decay rate of Adam's second running mean; overrides the second of `betas`."""

    eps: float = 1e-8
    """Term in Adam's denominator that prevents a division by zero."""

    weight_decay: float = 0.1
    """Decay of the weights towards zero, times the learning rate."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "weight_decay"):
            _not_negative(f"optimizer.{key}", getattr(self, key))
        beta1, beta2 = self.betas
        checked = ("beta1", self.beta1), ("beta2", self.beta2), ("betas", beta1), ("betas", beta2)
        for key, beta in checked:
            if beta is not None and not 0 <= beta < 1:
                raise UsageError(f"`optimizer.{key}` must be at least 0 and below 1, found: {beta}")

    @property
    def adam_betas(self) -> tuple[float, float]:
        """Values of `betas`, overridden by `beta1` and `beta2`."""
        return (
            self.betas[0] if self.beta1 is None else self.beta1,
            self.betas[1] if self.beta2 is None else self.beta2,
        )


@settings("lr_scheduler")
@dataclass(frozen=True, slots=True)
class LRSchedulerConfig:
    """Learning-rate schedule: linear warm-up, constant phase, decay."""

    warmup_steps: int = 200
    """Steps of the linear warm-up."""

    total_steps: int | None = None
    """Length of the schedule in steps; by default `training.steps`."""

    decay_ratio: float | None = None
    """Share of the steps that the decay takes, at the end. 0: no decay.
    By default the decay starts at the end of the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = 0.0
    """Learning rate at the end of the decay, as a share of `optimizer.lr`."""

    def __post_init__(self) -> None:
        _not_negative("lr_scheduler.warmup_steps", self.warmup_steps)
        if self.total_steps is not None:
            _at_least_one("lr_scheduler.total_steps", self.total_steps)
        for key in ("decay_ratio", "min_lr_factor"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"`lr_scheduler.{key}` must be from 0 to 1, found: {share}")


@settings("parallelism")
@dataclass(frozen=True, slots=True)
class ParallelismConfig:
    """Degrees of parallelism. The product of all but the expert degree is the number of workers."""

    data_parallel_replicate_degree: int = 1
    """Replicas of weights and optimizer state (HSDP; DDP if each replica is on one rank)."""

    data_parallel_shard_degree: int = -1
    """Ranks over which each replica is sharded (FSDP2). -1: all ranks left by the others."""

    tensor_parallel_degree: int = 1
    """Ranks over which each matrix is sharded."""

    pipeline_parallel_degree: int = 1
    """Ranks over which the layers are divided."""

    context_parallel_degree: int = 1
    """Ranks over which each sequence is divided."""

    expert_parallel_degree: int = 1
    """Ranks over which the experts of a layer are divided.
    It must divide the product of the shard, context and tensor degrees, whose ranks it reuses."""

    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule: 1F1B, GPipe or Interleaved1F1B (two stages on each rank).
    A microbatch is `training.local_batch_size` sequences."""

    def __post_init__(self) -> None:
        if self.pipeline_parallel_schedule not in STAGES_PER_RANK:
            raise _unknown_schedule(self.pipeline_parallel_schedule)
        for key in (*AXES.values(), "expert_parallel_degree"):
            degree = getattr(self, key)
            if key != "data_parallel_shard_degree" or degree != -1:
                _at_least_one(f"parallelism.{key}", degree)

    @property
    def stages_per_rank(self) -> int:
        """Stages on each rank of a pipeline."""
        return STAGES_PER_RANK[self.pipeline_parallel_schedule]

    def degrees(self, world_size: int) -> dict[str, int]:
        """Return the degree of each mesh axis, outermost first; a degree of -1 is computed.

        Raises:
            UsageError: the product is not `world_size`.
        """
        requested = {axis: int(getattr(self, key)) for axis, key in AXES.items()}
        fixed = math.prod(degree for degree in requested.values() if degree != -1)
        degrees = {axis: world_size // fixed if d == -1 else d for axis, d in requested.items()}
        if math.prod(degrees.values()) == world_size:
            return degrees
        nearest_degrees = min(
            _factorizations(world_size, len(requested)),
            # Compare degrees by their ratio: 2 and 8 are equally far from 4. Any degree suits -1.
            key=lambda candidate: sum(
                abs(math.log2(degree / wanted))
                for degree, wanted in zip(candidate, requested.values(), strict=True)
                if wanted != -1
            ),
        )
        named = [axis for axis, degree in requested.items() if degree != 1]
        product = " x ".join(f"`{AXES[axis]}` {requested[axis]}" for axis in named)
        flags = (
            f"--parallelism.{AXES[axis]} {degree}"
            for axis, degree in zip(requested, nearest_degrees, strict=True)
            if axis in named or degree != 1
        )
        raise UsageError(
            f"`[parallelism]` does not fit {world_size} "
            f"{'worker' if world_size == 1 else 'workers'}: {product or 'every degree is 1'}"
            + (f" = {fixed}" if named and -1 not in requested.values() else ""),
            hint=f"the nearest degrees that fit: {' '.join(flags)}; "
            "NGPU sets the number of workers",
        )


AXES = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
"""Keys in `[parallelism]` by mesh axis, outermost first."""

STAGES_PER_RANK = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}
"""Number of stages on each rank, by pipeline schedule."""


@settings("metrics")
@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Logged metrics."""

    log_freq: int = 10
    """Steps between lines of the log and of `metrics.jsonl`."""

    enable_tensorboard: bool = False
    """Also write TensorBoard events, to `tensorboard` below `job.dump_folder`."""

    def __post_init__(self) -> None:
        _at_least_one("metrics.log_freq", self.log_freq)


@settings("activation_checkpoint")
@dataclass(frozen=True, slots=True)
class ActivationCheckpointConfig:
    """Recomputation of activations in the backward pass, which saves memory and costs time."""

    mode: Literal["none", "selective", "full"] = "none"
    """full: recompute every layer from its input. selective: recompute what
    `selective_ac_option` selects."""

    selective_ac_option: str = "2"
    """Recomputation of mode selective. A number n: the whole of every n-th layer.
    `op`: every layer, except matrix products and attention."""

    def __post_init__(self) -> None:
        option = self.selective_ac_option
        if option != "op" and not (option.isdecimal() and int(option)):
            raise UsageError(
                "`activation_checkpoint.selective_ac_option` must be a number of at least 1, or "
                f"`op`, found: {option}"
            )


@settings("config")
@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a run, by section."""

    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(
        default_factory=ActivationCheckpointConfig
    )

    def check(self, world_size: int, flavor: Flavor | None = None) -> None:
        """Check that these settings can run on `world_size` workers.

        `flavor` replaces the flavor in the settings.

        Raises:
            UsageError: the settings do not fit. The message says why.
        """
        if self.checkpoint.create_seed_checkpoint and world_size != 1:
            keys = (*AXES.values(), "expert_parallel_degree")
            ones = " ".join(f"--parallelism.{key} 1" for key in keys)
            raise UsageError(
                "`checkpoint.create_seed_checkpoint` builds the whole model on one worker, found: "
                f"{world_size} workers",
                hint=f"NGPU=1, and {ones}",
            )
        degrees = self.parallelism.degrees(world_size)
        dp_size = degrees["dp_replicate"] * degrees["dp_shard"]
        batch = self.training.batch_per_rank(dp_size)
        self._check_sequences_and_heads(degrees)
        self._check_experts(degrees)
        if degrees["pp"] > 1:
            num_microbatches = batch // self.training.local_batch_size
            self._check_pipeline(degrees["pp"], num_microbatches, flavor or self.model.shape)

    def _check_sequences_and_heads(self, degrees: Mapping[str, int]) -> None:
        tp, cp, shape = degrees["tp"], degrees["cp"], self.model.shape
        seq_len = self.training.seq_len
        if seq_len % cp:
            raise UsageError(
                "`parallelism.context_parallel_degree` must divide `training.seq_len` "
                f"{seq_len}, found: {cp}",
                hint=f"--training.seq_len {math.ceil(seq_len / (cp * tp)) * cp * tp}",
            )
        length = f"`training.seq_len` {seq_len}"
        if cp > 1:
            length += f" / `parallelism.context_parallel_degree` {cp}"
        counts = {
            f"the {shape.num_heads} heads of `model.flavor` {self.model.flavor}": shape.num_heads,
            f"its {shape.num_kv_heads} key and value heads": shape.num_kv_heads,
            length: seq_len // cp,
        }
        uneven = [name for name, count in counts.items() if count % tp]
        if uneven:
            raise UsageError(
                f"`parallelism.tensor_parallel_degree` must divide {', '.join(uneven)}, found: "
                f"{tp}",
                hint="--parallelism.tensor_parallel_degree "
                f"{math.gcd(tp, *counts.values())} divides them all",
            )

    def _check_experts(self, degrees: Mapping[str, int]) -> None:
        ep, experts = self.parallelism.expert_parallel_degree, self.model.shape.experts
        if ep == 1:
            return
        if experts is None:
            raise UsageError(
                f"`parallelism.expert_parallel_degree` {ep}: `model.name` {self.model.name} has no "
                "experts",
                hint="--parallelism.expert_parallel_degree 1, or --model.name qwen3_moe",
            )
        num_ranks = degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
        if num_ranks % ep or experts.num_experts % ep:
            raise UsageError(
                "`parallelism.expert_parallel_degree` must divide the product of the shard, "
                f"context and tensor degrees {num_ranks}, and the {experts.num_experts} experts of "
                f"a layer, found: {ep}",
                hint="--parallelism.expert_parallel_degree "
                f"{math.gcd(ep, num_ranks, experts.num_experts)} divides both",
            )

    def _check_pipeline(self, pp: int, num_microbatches: int, shape: Flavor) -> None:
        schedule = self.parallelism.pipeline_parallel_schedule
        num_stages = pp * self.parallelism.stages_per_rank
        if shape.tied:
            raise UsageError(
                f"`model.flavor` {self.model.flavor} ties its embedding and output weights; a "
                "pipeline holds them on two ranks and would not sum their gradients",
                hint="--parallelism.pipeline_parallel_degree 1, or a flavor whose weights are "
                "not tied",
            )
        if num_stages > shape.num_layers:
            raise UsageError(
                f"a pipeline of {num_stages} stages ({schedule} on {pp} ranks) needs at least "
                f"as many layers, found: {shape.num_layers} in `model.flavor` {self.model.flavor}",
                hint="lower `parallelism.pipeline_parallel_degree`",
            )
        # torch's schedules need at least `pp` microbatches, Interleaved1F1B a multiple of `pp`.
        in_rounds = num_microbatches % pp == 0 or schedule != "Interleaved1F1B"
        if num_microbatches < pp or not in_rounds:
            raise UsageError(
                f"`parallelism.pipeline_parallel_schedule` {schedule} needs "
                f"{'at least' if in_rounds else 'a multiple of'} {pp} microbatches a step, one for "
                f"each rank of the pipeline, found: {num_microbatches}",
                hint="raise `training.global_batch_size`: the number of microbatches is sequences "
                "per step on a data-parallel rank / `training.local_batch_size`",
            )


def _unknown_schedule(name: str) -> UsageError:
    known = ", ".join(STAGES_PER_RANK)
    if name in ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV"):
        return UsageError(
            f"`parallelism.pipeline_parallel_schedule` {name} computes weight gradients after "
            "input gradients, when FSDP2 has freed the weights: they would be silently wrong",
            hint=f"one of {known}",
        )
    return UsageError(
        f"`parallelism.pipeline_parallel_schedule` must be one of {known}, found: {name!r}",
        hint=nearest(name, STAGES_PER_RANK),
    )


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"`{key}` must be at least 1, found: {value}")


def _not_negative(key: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"`{key}` must be a finite number of at least 0, found: {value}")


def _factorizations(product: int, length: int) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of `length` positive integers with this product."""
    if length == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for others in _factorizations(product // first, length - 1):
                yield (first, *others)
