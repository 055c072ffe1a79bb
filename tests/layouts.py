"""Tiny models trained by every layout of the ranks at hand, and what one process comes to."""

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
"""Not divided by 4: rows of the embedding are shared unevenly."""

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
"""Short names of degrees, as `Layout.text` has them."""


@dataclass(frozen=True)
class Layout:
    """Degrees, such as `shard2 tp2`, and which model lies over them."""

    text: str
    kind: str = "small"
    schedule: str = "1F1B"

    def __str__(self) -> str:
        schedule = f" {self.schedule}" if self.schedule != "1F1B" else ""
        return f"{self.text or 'alone'}{schedule} {self.kind}"

    def config(self, *more: str) -> Config:
        """A tiny run with plain SGD: AdamW would hide a gradient of the wrong scale.

        `more` are further arguments of the command line. A step accumulates over two turns, or as
        many as a pipeline has stages, however few ranks share its sequences.
        """
        axes = self._axes()
        share = SEQUENCES // (axes.get("replicate", 1) * axes.get("shard", 1))
        local = max(1, share // (4 if "pp" in axes else 2))
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
        """The degrees as arguments of the command line."""
        return [
            word
            for axis, degree in self._axes().items()
            for word in (f"--parallelism.{KEYS[axis]}", str(degree))
        ]

    def _axes(self) -> dict[str, int]:
        """Degrees by their short names."""
        return {axis: int(degree) for axis, degree in re.findall(r"([a-z]+)(\d+)", self.text)}


def add_flavors() -> None:
    """Make the tiny models known by name, in this process."""
    MODELS["llama3"]["small"] = SMALL
    MODELS["qwen3_moe"]["small"] = EXPERTS
    MODELS["llama3"]["tied"] = replace(SMALL, tied=True)


def parallel_context(config: Config) -> ParallelContext:
    """This process's place; the process group is there already. Collective."""
    device = torch.device("cpu")
    if not dist.is_initialized():
        return ParallelContext(0, 1, device)
    size = dist.get_world_size()
    config.check(size)
    ep = config.parallelism.expert_parallel_degree
    meshes = build_meshes(config.parallelism.degrees(size), device, ep)
    return ParallelContext(dist.get_rank(), size, device, meshes)


def trained(layout: Layout) -> dict[str, Any]:
    """Weights before, first gradients, losses and norms of some steps, and weights after.

    Collective.
    """
    config = layout.config()
    place = parallel_context(config)
    parts = build_model(config, place, VOCAB_SIZE)
    gradients = Gradients(config, place, parts)
    optimizers = build_optimizers(parts, config.optimizer)
    before, first, reports = weights(parts), {}, []
    for step in range(STEPS):
        inputs, labels = samples(config, place, step)
        loss = gradients.accumulate(inputs, labels)
        if step == 0:
            first = merged(
                {n: full_tensor(p.grad).clone() for n, p in named(parts) if p.grad is not None}
            )
        norm = clip_gradients(parts, config.training.max_norm, place)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        reports.append((sum_over_data(loss, place), norm.item()))
    return {"before": before, "gradients": first, "reports": reports, "after": weights(parts)}


def samples(config: Config, place: ParallelContext, step: int) -> tuple[Tensor, Tensor]:
    """This rank's share of a step."""
    share = config.training.batch_per_rank(place.dp_size)
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(VOCAB_SIZE, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    mine = batch[place.dp_rank * share : (place.dp_rank + 1) * share]
    return mine[:, :-1], mine[:, 1:]


def named(parts: list[nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """The parameters of all parts that this rank holds."""
    return [pair for part in parts for pair in part.named_parameters()]


def weights(parts: list[nn.Module]) -> dict[str, Tensor]:
    """All weights of the whole model, gathered to rank 0. Collective."""
    return merged({name: full_tensor(value.detach()).clone() for name, value in named(parts)})


def merged(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold together, on rank 0. Collective."""
    if not dist.is_initialized():
        return mine
    everyones: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyones)
    return {name: value for held in everyones or [] for name, value in held.items()}


def train_all(rank: int, size: int, layouts: list[Layout]) -> list[dict[str, Any]]:
    """What comes of each layout, one after the other on the same ranks; on rank 0."""
    add_flavors()
    # Gathering a weight for the comparison may take several steps, of which torch warns.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in layouts:
            try:
                found.append(trained(layout))
            except Exception as error:
                raise RuntimeError(f"{layout}: {error}") from error
    return found if rank == 0 else []
