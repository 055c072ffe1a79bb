"""Pipeline parallelism: which blocks go to which stage, and the schedule that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from holdfast.trainer.config import ParallelismConfig
from holdfast.trainer.model import ModelPart

Loss = Callable[[Tensor, Tensor], Tensor]


def parts_of(
    num_layers: int, config: ParallelismConfig, index: int, degree: int
) -> list[ModelPart]:
    """What rank `index` of a pipeline of `degree` holds: one part, or one for each round trip.

    Stages go to the ranks in turn: stage 0 to rank 0, 1 to rank 1, and so on, then round again.
    A rank on its own holds the whole model, whatever the schedule.
    """
    num_stages = degree * config.stages_per_rank if degree > 1 else 1
    bounds = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    return [
        ModelPart(range(bounds[stage], bounds[stage + 1]), num_layers)
        for stage in range(index, num_stages, degree)
    ]


class Pipeline:
    """The stages of this rank and the schedule of their forward and backward passes."""

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        config: ParallelismConfig,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        num_microbatches: int,
        loss: Loss,
    ) -> None:
        """`mesh` are the ranks of this pipeline; `loss` is taken of each microbatch."""
        index, degree = mesh.get_local_rank(), mesh.size()
        num_stages = degree * len(model_parts)
        stages = [
            PipelineStage(part, index + degree * turn, num_stages, device, group=mesh.get_group())
            for turn, part in enumerate(model_parts)
        ]
        self._first = stages[0].is_first
        self._last = stages[-1].is_last
        self._device = device
        kind = get_schedule_class(config.pipeline_parallel_schedule)
        # The loss of a microbatch is its part of the whole already: nothing is scaled after it.
        settings = {"loss_fn": loss, "scale_grads": False}
        self._schedule: PipelineScheduleSingle | PipelineScheduleMulti
        if issubclass(kind, PipelineScheduleMulti):
            self._schedule = kind(stages, num_microbatches, **settings)
        else:
            (stage,) = stages
            self._schedule = kind(stage, num_microbatches, **settings)

    def run(self, inputs: Tensor, labels: Tensor) -> list[Tensor]:
        """Take a batch forward and backward; the losses of its microbatches, on the last rank.

        Collective: every rank of the pipeline calls this with the same batch.
        """
        losses: list[Tensor] = []
        given = (inputs,) if self._first else ()
        if self._last:
            self._schedule.step(*given, target=labels, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*given, return_outputs=False)
        return losses
