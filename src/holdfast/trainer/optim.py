"""Optimizers, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from holdfast.trainer.config import LRSchedulerConfig, OptimizerConfig
from holdfast.trainer.parallel import ParallelContext, local_shard


def build_optimizers(
    stages: Sequence[nn.Module], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Build the optimizers: for each pipeline stage, one for each device mesh of its weights.

    Experts have their own mesh, and a kernel cannot take tensors of several meshes at once.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name != "SGD":
        # On sharded weights, the unfused loop spends most of its time on dispatch.
        settings |= {"betas": config.adam_betas, "eps": config.eps, "fused": True}
    optimizer_class = getattr(torch.optim, config.name)
    groups: dict[object, list[nn.Parameter]] = {}
    for number, stage in enumerate(stages):
        for parameter in stage.parameters():
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((number, mesh), []).append(parameter)
    return [optimizer_class(parameters, **settings) for parameters in groups.values()]


def build_schedulers(
    optimizers: Sequence[torch.optim.Optimizer], config: LRSchedulerConfig, steps: int
) -> list[LambdaLR]:
    """Build the same schedule for each optimizer."""
    return [LambdaLR(optimizer, lr_curve(config, steps)) for optimizer in optimizers]


def apply_schedules(schedulers: Sequence[LambdaLR]) -> None:
    """Set the optimizers' learning rates to the rates of the schedules' current step.

    A loaded checkpoint contains the next step's rate. If the schedule has changed since, for
    example to more steps, that rate would be wrong for one step.
    """
    for scheduler in schedulers:
        for group, base_lr, factor in zip(
            scheduler.optimizer.param_groups,
            scheduler.base_lrs,
            scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base_lr * factor(scheduler.last_epoch)


def lr_curve(config: LRSchedulerConfig, steps: int) -> Callable[[int], float]:
    """Return a function that maps a step, counted from 0, to the factor of its learning rate.

    The schedule has a linear warm-up, a constant phase and a decay. The factors of its first and
    last step are above 0, since a step with factor 0 would learn nothing. `steps`: length of the
    schedule if `total_steps` is None.
    """
    total = config.total_steps or steps
    warmup = min(config.warmup_steps, total)
    decay = total - warmup
    if config.decay_ratio is not None:
        decay = min(decay, round(total * config.decay_ratio))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        decay_step = step - (total - decay) + 1
        if decay == 0 or decay_step <= 0:
            return 1.0
        progress = min(1.0, decay_step / (decay + 1))
        remaining = {
            "linear": 1 - progress,
            "sqrt": 1 - math.sqrt(progress),
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[config.decay_type]
        return config.min_lr_factor + (1 - config.min_lr_factor) * remaining

    return factor


def clip_gradients(
    stages: Sequence[nn.Module], max_norm: float, parallel: ParallelContext
) -> Tensor:
    """Clip the norm of all gradients to `max_norm`; 0: do not clip. Return the norm before that.
    Collective."""
    parameters = [p for stage in stages for p in stage.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(gradients, parallel)
    if max_norm:
        # On local shards: torch's function needs all gradients on one mesh.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local_shard(gradient)[0].mul_(scale)
    return norm


def gradient_norm(gradients: Sequence[Tensor], parallel: ParallelContext) -> Tensor:
    """Return the norm of all gradients as a plain scalar tensor. Collective.

    Needs one all-reduce. `torch.nn.utils` needs one per mesh axis.
    """
    total = torch.zeros((), device=parallel.device)
    for gradient in gradients:
        local, num_replicas = local_shard(gradient)
        # Divided, since each rank with a replica of this shard adds the same term to the sum.
        total += local.float().square().sum() / num_replicas
    if parallel.world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def overridden_settings(
    optimizers: Sequence[torch.optim.Optimizer], config: OptimizerConfig
) -> list[str]:
    """Return a message for each setting in `[optimizer]` that a loaded checkpoint overrides."""
    configured: dict[str, Any] = {"initial_lr": config.lr, "weight_decay": config.weight_decay}
    if config.name != "SGD":
        configured |= {"betas": config.adam_betas, "eps": config.eps}
    messages = {
        f"`optimizer.{key.removeprefix('initial_')}`: the checkpoint's {group[key]} is used in "
        f"place of the configured {value}"
        for optimizer in optimizers
        for group in optimizer.param_groups
        for key, value in configured.items()
        if key in group and _as_tuple(group[key]) != value
    }
    return sorted(messages)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
