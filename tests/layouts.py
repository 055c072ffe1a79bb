"""Tiny models, and the results of training them in any layout."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.hf.flavors import MODELS, ExpertFlavor, Flavor
from holdfast.trainer.arguments import read_config
from holdfast.trainer.config import Config
from holdfast.trainer.gradients import Gradients
from holdfast.trainer.optim import build_optimizers, clip_gradients
from holdfast.trainer.parallel import (
    ParallelContext,
    build_meshes,
    build_model,
    full_tensor,
    sum_over_data,
)

VOCAB_SIZE = 262
"""Rows of the embedding; not a multiple of 4, so that they are sharded unevenly."""

SMALL = Flavor(64, 4, 8, 4, 96, vocab_size=VOCAB_SIZE)
EXPERTS = replace(SMALL, head_width=16, head_norm=True, experts=ExpertFlavor(8, 2, 32))
STEPS = 2
SEQUENCES = 8
SEQ_LEN = 16

KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "cp": "context_parallel_degree",
    "ep": "expert_parallel_degree",
}
"""Keys in `[parallelism]`, by their short names in `Layout.text`."""


@dataclass(frozen=True)
class Layout:
    """Degrees, such as `shard2 tp2`, and the kind of the model."""

    text: str
    kind: str = "small"
    schedule: str = "1F1B"

    def __str__(self) -> str:
        schedule = f" {self.schedule}" if self.schedule != "1F1B" else ""
        return f"{self.text or 'alone'}{schedule} {self.kind}"

    def config(self, *more: str) -> Config:
        """Return the settings of a tiny run, with further command-line arguments `more`.

        Uses SGD, since AdamW would hide a gradient of the wrong scale. A step accumulates over two
        forward passes, or over four microbatches in a pipeline.
        """
        axes = self._axes()
        batch_per_rank = SEQUENCES // (axes.get("replicate", 1) * axes.get("shard", 1))
        local = max(1, batch_per_rank // (4 if "pp" in axes else 2))
        arguments = (
            f"--model.name {'qwen3_moe' if 'experts' in self.kind else 'llama3'} "
            f"--model.flavor {'tied' if self.kind == 'tied' else 'small'} --optimizer.name SGD "
            "--optimizer.lr 0.2 --optimizer.weight_decay 0 --training.seed 3 "
            f"--training.seq_len {SEQ_LEN} --training.local_batch_size {local} "
            f"--training.global_batch_size {SEQUENCES} --training.max_norm 0.5 "
            f"--activation_checkpoint.mode {'full' if 'recompute' in self.kind else 'none'} "
            "--parallelism.data_parallel_shard_degree 1 "
            f"--parallelism.pipeline_parallel_schedule {self.schedule}"
        ).split()
        return read_config([*arguments, *self.degrees(), *more])

    def degrees(self) -> list[str]:
        """Return the degrees as command-line arguments."""
        return [
            word
            for axis, degree in self._axes().items()
            for word in (f"--parallelism.{KEYS[axis]}", str(degree))
        ]

    def _axes(self) -> dict[str, int]:
        """Return the degrees by their short names."""
        return {axis: int(degree) for axis, degree in re.findall(r"([a-z]+)(\d+)", self.text)}


def add_flavors() -> None:
    """Register the tiny models as flavors, in this process."""
    MODELS["llama3"]["small"] = SMALL
    MODELS["qwen3_moe"]["small"] = EXPERTS
    MODELS["llama3"]["tied"] = replace(SMALL, tied=True)


def parallel_context(config: Config) -> ParallelContext:
    """Build the meshes in the existing process group. Collective."""
    device = torch.device("cpu")
    if not dist.is_initialized():
        return ParallelContext(0, 1, device)
    size = dist.get_world_size()
    config.check(size)
    ep = config.parallelism.expert_parallel_degree
    meshes = build_meshes(config.parallelism.degrees(size), device, ep)
    return ParallelContext(dist.get_rank(), size, device, meshes)


def trained(layout: Layout) -> dict[str, Any]:
    """Train some steps; return weights before and after, first gradients, losses and norms.

    Collective.
    """
    config = layout.config()
    parallel = parallel_context(config)
    stages = build_model(config, parallel, VOCAB_SIZE)
    gradients = Gradients(config, parallel, stages)
    optimizers = build_optimizers(stages, config.optimizer)
    before, first, reports = weights(stages), {}, []
    for step in range(STEPS):
        inputs, labels = samples(config, parallel, step)
        loss = gradients.accumulate(inputs, labels)
        if step == 0:
            first = gathered(
                {n: full_tensor(p.grad).clone() for n, p in named(stages) if p.grad is not None}
            )
        norm = clip_gradients(stages, config.training.max_norm, parallel)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        reports.append((sum_over_data(loss, parallel), norm.item()))
    return {"before": before, "gradients": first, "reports": reports, "after": weights(stages)}


def samples(config: Config, parallel: ParallelContext, step: int) -> tuple[Tensor, Tensor]:
    """Return this rank's inputs and labels of a step."""
    count = config.training.batch_per_rank(parallel.dp_size)
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(VOCAB_SIZE, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    local = batch[parallel.dp_rank * count : (parallel.dp_rank + 1) * count]
    return local[:, :-1], local[:, 1:]


def named(stages: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of all stages on this rank, with their names."""
    return [pair for stage in stages for pair in stage.named_parameters()]


def weights(stages: list[nn.Module]) -> dict[str, Tensor]:
    """Gather all weights of the model on rank 0. Collective."""
    return gathered({name: full_tensor(value.detach()).clone() for name, value in named(stages)})


def gathered(local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the dictionaries of all ranks on rank 0. Collective."""
    if not dist.is_initialized():
        return local
    by_rank: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, by_rank)
    return {name: value for tensors in by_rank or [] for name, value in tensors.items()}


def train_all(rank: int, size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Train in each layout in turn on the same ranks; return the results on rank 0."""
    add_flavors()
    # torch warns when it gathers a weight, which the comparison does, in several steps.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in layouts:
            try:
                results.append(trained(layout))
            except Exception as error:
                raise RuntimeError(f"{layout}: {error}") from error
    return results if rank == 0 else []
