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
from holdfast.trainer.parallel import Place, local_share


def build_optimizers(
    model_parts: Sequence[nn.Module], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """One optimizer for each part of the model, and each mesh that its weights lie on.

    Experts lie on a mesh of their own, and no kernel takes tensors of several meshes at once.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name != "SGD":
        # Fused: on sharded weights the unfused loop spends its time in dispatch, not arithmetic.
        settings |= {"betas": config.adam_betas, "eps": config.eps, "fused": True}
    kind = getattr(torch.optim, config.name)
    together: dict[object, list[nn.Parameter]] = {}
    for number, part in enumerate(model_parts):
        for parameter in part.parameters():
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            together.setdefault((number, mesh), []).append(parameter)
    return [kind(parameters, **settings) for parameters in together.values()]


def build_schedulers(
    optimizers: Sequence[torch.optim.Optimizer], config: LRSchedulerConfig, steps: int
) -> list[LambdaLR]:
    """One schedule for each optimizer, all the same."""
    return [LambdaLR(optimizer, lr_curve(config, steps)) for optimizer in optimizers]


def follow_schedules(schedulers: Sequence[LambdaLR]) -> None:
    """Set the learning rates anew from the schedules' own step.

    A checkpoint brings the rate that its run would have gone on with; where the curve has changed
    since, by more steps say, the first step would still be taken at that.
    """
    for scheduler in schedulers:
        for group, full, share in zip(
            scheduler.optimizer.param_groups,
            scheduler.base_lrs,
            scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = full * share(scheduler.last_epoch)


def lr_curve(config: LRSchedulerConfig, steps: int) -> Callable[[int], float]:
    """The share of the learning rate for a step, counted from 0.

    Up in a straight line over the warm-up, level, then down over the last steps. The first step
    does not stand at 0 nor the last at the very end of the fall: neither would learn anything.
    """
    total = config.total_steps or steps
    warmup = min(config.warmup_steps, total)
    falling = total - warmup
    if config.decay_ratio is not None:
        falling = min(falling, round(total * config.decay_ratio))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        fallen = step - (total - falling) + 1
        if falling == 0 or fallen <= 0:
            return 1.0
        way = min(1.0, fallen / (falling + 1))
        left = {
            "linear": 1 - way,
            "sqrt": 1 - math.sqrt(way),
            "cosine": (1 + math.cos(math.pi * way)) / 2,
        }[config.decay_type]
        return config.min_lr_factor + (1 - config.min_lr_factor) * left

    return share


def clip_gradients(model_parts: Sequence[nn.Module], max_norm: float, place: Place) -> Tensor:
    """The norm of all gradients together, which are scaled down to `max_norm` (0: left alone).

    Collective.
    """
    parameters = [p for part in model_parts for p in part.parameters()]
    norm = gradient_norm([p.grad for p in parameters if p.grad is not None], place)
    if max_norm:
        # On each rank's own pieces: torch's function wants all gradients on one mesh.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                local_share(parameter.grad)[0].mul_(scale)
    return norm


def gradient_norm(gradients: Sequence[Tensor], place: Place) -> Tensor:
    """The norm of all gradients together, a plain scalar. Collective.

    One sum over all ranks: `torch.nn.utils` takes one for each axis of the mesh, and warns of it.
    """
    total = torch.zeros((), device=place.device)
    for gradient in gradients:
        local, num_copies = local_share(gradient)
        # Each rank that has a copy of the same piece brings its part of the piece's square.
        total += local.float().square().sum() / num_copies
    if place.world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()


def restored_otherwise(
    optimizers: Sequence[torch.optim.Optimizer], config: OptimizerConfig
) -> list[str]:
    """What a resume brought back that the configuration has otherwise, a line each.

    The checkpoint's value is the one in force; it would be a silent surprise.
    """
    wanted: dict[str, Any] = {"initial_lr": config.lr, "weight_decay": config.weight_decay}
    if config.name != "SGD":
        wanted |= {"betas": config.adam_betas, "eps": config.eps}
    found = {
        f"`optimizer.{key.removeprefix('initial_')}`: {group[key]}, which the step was saved with, "
        f"is used; configured is {value}"
        for optimizer in optimizers
        for group in optimizer.param_groups
        for key, value in wanted.items()
        if key in group and _plain(group[key]) != value
    }
    return sorted(found)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
