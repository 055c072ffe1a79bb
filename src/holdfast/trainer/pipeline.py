"""Pipeline parallelism: the layers of each stage, and the schedule that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from holdfast.trainer.config import ParallelismConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function that computes the loss from logits and labels."""


def stages_of_rank(
    num_layers: int, config: ParallelismConfig, index: int, degree: int
) -> list[range]:
    """Return the layers of each stage on rank `index` of a pipeline of `degree` ranks.

    Stage `s` is on rank `s % degree`. Without a pipeline (degree 1) the model is one stage.
    """
    num_stages = degree * config.stages_per_rank if degree > 1 else 1
    bounds = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    return [range(bounds[s], bounds[s + 1]) for s in range(index, num_stages, degree)]


class Pipeline:
    """Schedule of forward and backward passes through this rank's stages."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        config: ParallelismConfig,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        num_microbatches: int,
        loss: Loss,
    ) -> None:
        """Build the schedule of `modules`, the stages of this rank. `mesh`: ranks of the pipeline.

        `loss` is computed for each microbatch.
        """
        index, degree = mesh.get_local_rank(), mesh.size()
        num_stages = degree * len(modules)
        stages = [
            PipelineStage(module, index + degree * turn, num_stages, device, group=mesh.get_group())
            for turn, module in enumerate(modules)
        ]
        self._first = stages[0].is_first
        self._last = stages[-1].is_last
        schedule_class: Any = get_schedule_class(config.pipeline_parallel_schedule)
        self._schedule = schedule_class(
            stages if issubclass(schedule_class, PipelineScheduleMulti) else stages[0],
            num_microbatches,
            loss_fn=loss,
            # `loss` already gives a microbatch's share of the step's loss.
            scale_grads=False,
        )

    def run(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Run a batch forward and backward; return the microbatch losses on the last rank.

        Other ranks return an empty list. Collective: every rank of the pipeline passes the same
        batch.
        """
        losses: list[Tensor] = []
        stage_inputs = (inputs,) if self._first else ()
        targets = {"target": labels, "losses": losses} if self._last else {}
        self._schedule.step(*stage_inputs, **targets, return_outputs=False)
        return losses
