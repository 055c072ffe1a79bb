"""Every setting of a training run: TorchTitan's sections and keys, checked at birth.

Free of torch: `--help` and a wrong setting answer at once. `arguments` fills these classes from a
TOML file and the command line.
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
    """Name of the run, and where it writes."""

    dump_folder: str = "./outputs"
    """Folder for everything that the run writes; relative to the current directory."""

    description: str = "training run"
    """Text for the first line of the log."""

    config_file: str | None = None
    """TOML file with any of these keys. The command line overrides it."""

    debug: bool = False
    """Show the traceback of an error, not only its message."""


@settings("model")
@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model."""

    name: Literal["llama3", "qwen3_moe"] = "llama3"
    """Model family. `qwen3_moe` has experts."""

    flavor: str = "debugmodel"
    """Size of the model. llama3: debugmodel, 1B, 3B, 8B, 70B or 405B. qwen3_moe: debugmodel,
    30B-A3B or 235B-A22B."""

    hf_assets_path: str | None = None
    """Folder with a `tokenizer.json`, whose files an export copies too. Without it, each byte of
    the text is a token."""

    def __post_init__(self) -> None:
        known = MODELS[self.name]
        if self.flavor not in known:
            raise UsageError(
                f"`model.flavor` is one of {', '.join(known)}, found: {self.flavor}",
                hint=nearest(self.flavor, known),
            )

    @property
    def shape(self) -> Flavor:
        """The sizes that `name` and `flavor` stand for."""
        return MODELS[self.name][self.flavor]


@settings("training")
@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Data, batch sizes and number of steps."""

    dataset: str = "stdlib"
    """`stdlib`, which is the sources of Python's standard library, or a data set on the Hugging
    Face hub (`owner/name` or `owner/name:config`), whose `text` column is used."""

    dataset_path: str | None = None
    """A .txt, .jsonl or .parquet file, or a folder of such files. Overrides `dataset`."""

    local_batch_size: int = 8
    """Sequences that one data-parallel rank passes through the model at a time."""

    global_batch_size: int = -1
    """Sequences per step over all ranks; gradients are accumulated to reach it. -1 means
    `local_batch_size` times the number of data-parallel ranks."""

    seq_len: int = 2048
    """Tokens in a sequence."""

    steps: int = 10000
    """Number of optimizer steps."""

    seed: int = 0
    """Seed of the initial weights and of the data order, which do not depend on the number of
    workers."""

    deterministic: bool = False
    """Use only algorithms that give the same bits in every run. Slower on a GPU."""

    max_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down. 0 turns this off."""

    def __post_init__(self) -> None:
        for key in ("local_batch_size", "seq_len", "steps"):
            _at_least_one(f"training.{key}", getattr(self, key))
        if self.global_batch_size != -1:
            _at_least_one("training.global_batch_size", self.global_batch_size)
        _not_negative("training.seed", self.seed)
        _not_negative("training.max_norm", self.max_norm)

    def batch_per_rank(self, dp_size: int) -> int:
        """Sequences per step that one of `dp_size` data-parallel ranks trains on."""
        if self.global_batch_size == -1:
            return self.local_batch_size
        together = self.local_batch_size * dp_size
        if self.global_batch_size % together:
            fitting = max(1, round(self.global_batch_size / together)) * together
            raise UsageError(
                f"`training.global_batch_size` is a multiple of `training.local_batch_size` "
                f"{self.local_batch_size} x {dp_size} data-parallel ranks = {together}: "
                f"{self.global_batch_size}",
                hint=f"the nearest that fits: --training.global_batch_size {fitting}",
            )
        return self.global_batch_size // dp_size


@settings("optimizer")
@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """Class in `torch.optim`."""

    lr: float = 8e-4
    """Learning rate after the warm-up."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two running means."""

    beta1: float | None = None
    """First of `betas`. Overrides it."""

    beta2: float | None = None
    """Second of `betas`. Overrides it."""

    eps: float = 1e-8
    """Constant in Adam's denominator."""

    weight_decay: float = 0.1
    """Weight decay coefficient."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "weight_decay"):
            _not_negative(f"optimizer.{key}", getattr(self, key))
        decays = [("beta1", self.beta1), ("beta2", self.beta2)]
        for key, beta in (*decays, *(("betas", beta) for beta in self.betas)):
            if beta is not None and not 0 <= beta < 1:
                raise UsageError(f"`optimizer.{key}` must be from 0 to below 1, found: {beta}")

    @property
    def adam_betas(self) -> tuple[float, float]:
        """`betas`, with `beta1` and `beta2` put in where given."""
        return (
            self.betas[0] if self.beta1 is None else self.beta1,
            self.betas[1] if self.beta2 is None else self.beta2,
        )


@settings("lr_scheduler")
@dataclass(frozen=True, slots=True)
class LRSchedulerConfig:
    """The learning rate over the steps: warm-up, constant, decay."""

    warmup_steps: int = 200
    """Steps of the linear warm-up."""

    total_steps: int | None = None
    """Steps of the whole schedule; `training.steps` by default."""

    decay_ratio: float | None = None
    """Share of the steps, at the end, during which the rate decays. 0: it stays constant after the
    warm-up. By default it decays from the end of the warm-up."""

    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    """Shape of the decay."""

    min_lr_factor: float = 0.0
    """Final learning rate, as a share of `optimizer.lr`."""

    def __post_init__(self) -> None:
        _not_negative("lr_scheduler.warmup_steps", self.warmup_steps)
        if self.total_steps is not None:
            _at_least_one("lr_scheduler.total_steps", self.total_steps)
        for key in ("decay_ratio", "min_lr_factor"):
            share = getattr(self, key)
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"`lr_scheduler.{key}` is a share from 0 to 1: {share}")


@settings("parallelism")
@dataclass(frozen=True, slots=True)
class ParallelismConfig:
    """How the workers share model and data. The degrees multiply to the number of workers."""

    data_parallel_replicate_degree: int = 1
    """Copies of weights and optimizer state, each on its own ranks: DDP if a copy is on one rank,
    else HSDP."""

    data_parallel_shard_degree: int = -1
    """Ranks that shard one copy of weights and optimizer state by FSDP2. -1 takes all ranks that
    are left."""

    tensor_parallel_degree: int = 1
    """Ranks that shard each matrix."""

    pipeline_parallel_degree: int = 1
    """Ranks that share the blocks of the model."""

    context_parallel_degree: int = 1
    """Ranks that shard each sequence."""

    expert_parallel_degree: int = 1
    """Ranks that share the experts of a block, among those of the shard, context and tensor
    degrees: it divides their product, and is no further factor."""

    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule: 1F1B, GPipe or Interleaved1F1B (two stages per rank). A microbatch has
    `training.local_batch_size` sequences."""

    def __post_init__(self) -> None:
        if self.pipeline_parallel_schedule not in STAGES_PER_RANK:
            raise _unknown_schedule(self.pipeline_parallel_schedule)
        for key in (*AXES.values(), "expert_parallel_degree"):
            degree = getattr(self, key)
            if key == FILLING and degree == -1:
                continue
            _at_least_one(f"parallelism.{key}", degree)

    @property
    def stages_per_rank(self) -> int:
        """Parts of the model that each rank of a pipeline holds."""
        return STAGES_PER_RANK[self.pipeline_parallel_schedule]

    def degrees(self, world_size: int) -> dict[str, int]:
        """Axis of the mesh, outermost first, to its degree; -1 is replaced by what is left."""
        given = {axis: int(getattr(self, key)) for axis, key in AXES.items()}
        rest = math.prod(degree for degree in given.values() if degree != -1)
        degrees = {axis: world_size // rest if d == -1 else d for axis, d in given.items()}
        if math.prod(degrees.values()) == world_size:
            return degrees
        fitting = min(
            _factorizations(world_size, len(given)),
            # By ratio: from 4, both 2 and 8 are one doubling away. -1 is content with any.
            key=lambda f: sum(
                abs(math.log2(a / b)) for a, b in zip(f, given.values(), strict=True) if b != -1
            ),
        )
        named = [axis for axis, d in given.items() if d != 1]
        product = " x ".join(f"`{AXES[axis]}` {given[axis]}" for axis in named)
        flags = (
            f"--parallelism.{AXES[axis]} {degree}"
            for axis, degree in zip(given, fitting, strict=True)
            if axis in named or degree != 1
        )
        raise UsageError(
            f"`[parallelism]` does not fit {world_size} "
            f"{'worker' if world_size == 1 else 'workers'}: {product or 'every degree is 1'}"
            + (f" = {rest}" if named and -1 not in given.values() else ""),
            hint=f"the nearest that fits: {' '.join(flags)}; NGPU sets the number of workers",
        )


AXES = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
"""Axis of the mesh, outermost first, to its key in `[parallelism]`."""

STAGES_PER_RANK = {"1F1B": 1, "GPipe": 1, "Interleaved1F1B": 2}
"""Schedule of a pipeline to the number of its stages on each rank."""

FILLING = "data_parallel_shard_degree"
"""The one degree that may be -1."""


@settings("metrics")
@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """What a run reports."""

    log_freq: int = 10
    """Steps between lines of the log and of `metrics.jsonl`."""

    enable_tensorboard: bool = False
    """Also write TensorBoard events, in `tensorboard` below `job.dump_folder`."""

    def __post_init__(self) -> None:
        _at_least_one("metrics.log_freq", self.log_freq)


@settings("activation_checkpoint")
@dataclass(frozen=True, slots=True)
class ActivationCheckpointConfig:
    """Trades memory for time in the backward pass."""

    mode: Literal["none", "selective", "full"] = "none"
    """`full`: keep only the input of each block, and recompute the rest. `selective`: recompute
    less, see `selective_ac_option`."""

    selective_ac_option: str = "2"
    """What `selective` recomputes. A number n: every n-th block. `op`: everything in each block but
    matrix products and attention."""

    def __post_init__(self) -> None:
        option = self.selective_ac_option
        if option != "op" and not (option.isdecimal() and int(option)):
            raise UsageError(
                f"`activation_checkpoint.selective_ac_option` is a number from 1 on, or `op`: "
                f"{option}"
            )


@settings("config")
@dataclass(frozen=True, slots=True)
class Config:
    """All sections of the configuration of a run."""

    job: JobConfig = field(default_factory=JobConfig)
    """Name of the run, and where it writes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Data, batch sizes and number of steps."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""

    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    """The learning rate over the steps."""

    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    """How the workers share model and data."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, what to keep, and what to start from."""

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What a run reports."""

    activation_checkpoint: ActivationCheckpointConfig = field(
        default_factory=ActivationCheckpointConfig
    )
    """Memory against time in the backward pass."""

    def check(self, world_size: int) -> None:
        """Refuse what cannot run on `world_size` workers; every reason is listed."""
        if self.checkpoint.create_seed_checkpoint and world_size != 1:
            keys = (*AXES.values(), "expert_parallel_degree")
            ones = " ".join(f"--parallelism.{key} 1" for key in keys)
            raise UsageError(
                "`checkpoint.create_seed_checkpoint` builds the whole model on one worker, there "
                f"are {world_size}",
                hint=f"NGPU=1, and {ones}",
            )
        degrees = self.parallelism.degrees(world_size)
        dp_size = degrees["dp_replicate"] * degrees["dp_shard"]
        batch = self.training.batch_per_rank(dp_size)
        self._check_slices(degrees)
        self._check_experts(degrees)
        if degrees["pp"] > 1:
            self._check_pipeline(degrees["pp"], batch // self.training.local_batch_size)

    def _check_slices(self, degrees: Mapping[str, int]) -> None:
        tp, cp, shape = degrees["tp"], degrees["cp"], self.model.shape
        seq_len = self.training.seq_len
        if seq_len % cp:
            raise UsageError(
                f"`parallelism.context_parallel_degree` divides `training.seq_len` {seq_len}: {cp}",
                hint=f"--training.seq_len {math.ceil(seq_len / (cp * tp)) * cp * tp}",
            )
        stretch = f"`training.seq_len` {seq_len}"
        if cp > 1:
            stretch += f" / `parallelism.context_parallel_degree` {cp}"
        shared = {
            f"the {shape.num_heads} heads of `model.flavor` {self.model.flavor}": shape.num_heads,
            f"its {shape.num_kv_heads} key and value heads": shape.num_kv_heads,
            stretch: seq_len // cp,
        }
        uneven = [what for what, count in shared.items() if count % tp]
        if uneven:
            raise UsageError(
                f"`parallelism.tensor_parallel_degree` divides {', '.join(uneven)}: {tp}",
                hint="--parallelism.tensor_parallel_degree "
                f"{math.gcd(tp, *shared.values())} divides them all",
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
        sharing = degrees["dp_shard"] * degrees["cp"] * degrees["tp"]
        if sharing % ep or experts.num_experts % ep:
            raise UsageError(
                "`parallelism.expert_parallel_degree` divides the product of the shard, context "
                f"and tensor degrees {sharing}, and the {experts.num_experts} experts of a block: "
                f"{ep}",
                hint="--parallelism.expert_parallel_degree "
                f"{math.gcd(ep, sharing, experts.num_experts)} divides both",
            )

    def _check_pipeline(self, pp: int, num_microbatches: int) -> None:
        shape, schedule = self.model.shape, self.parallelism.pipeline_parallel_schedule
        num_stages = pp * self.parallelism.stages_per_rank
        if shape.tied:
            raise UsageError(
                f"`model.flavor` {self.model.flavor} has one weight for its first and its last "
                "layer, which a pipeline would keep on two ranks that never add up its gradients",
                hint="--parallelism.pipeline_parallel_degree 1, or a flavor whose weights are "
                "not tied",
            )
        if num_stages > shape.num_layers:
            raise UsageError(
                f"a pipeline of {num_stages} stages ({schedule} on {pp} ranks) has no more than "
                f"the {shape.num_layers} layers of `model.flavor` {self.model.flavor}",
                hint="a lower `parallelism.pipeline_parallel_degree`",
            )
        # torch's schedules refuse fewer; Interleaved1F1B goes in rounds of `pp` microbatches.
        in_rounds = num_microbatches % pp == 0 or schedule != "Interleaved1F1B"
        if num_microbatches < pp or not in_rounds:
            raise UsageError(
                f"`parallelism.pipeline_parallel_schedule` {schedule} takes "
                f"{'at least' if in_rounds else 'a multiple of'} {pp} microbatches a step, one for "
                f"each rank of the pipeline, found: {num_microbatches}",
                hint="sequences per step on a data-parallel rank / `training.local_batch_size` is "
                "the number of microbatches: raise `training.global_batch_size`",
            )


def _unknown_schedule(name: str) -> UsageError:
    known = ", ".join(STAGES_PER_RANK)
    if name in ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV"):
        return UsageError(
            f"`parallelism.pipeline_parallel_schedule` {name} takes the gradients of weights after "
            "those of inputs, by when FSDP2 has let go of the weights: wrong without a word",
            hint=f"one of {known}",
        )
    return UsageError(
        f"`parallelism.pipeline_parallel_schedule` is one of {known}, found: {name!r}",
        hint=nearest(name, STAGES_PER_RANK),
    )


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"`{key}` is at least 1: {value}")


def _not_negative(key: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"`{key}` is a number, at least 0: {value}")


def _factorizations(product: int, length: int) -> Iterator[tuple[int, ...]]:
    if length == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for others in _factorizations(product // first, length - 1):
                yield (first, *others)
