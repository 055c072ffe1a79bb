"""Forward and backward passes of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

from holdfast.trainer.config import Config
from holdfast.trainer.context import sequence_slice
from holdfast.trainer.parallel import ParallelContext, full_tensor, redistribute_gradients
from holdfast.trainer.pipeline import Pipeline


class Gradients:
    """Forward and backward passes through this process's stages of the model."""

    def __init__(
        self, config: Config, parallel: ParallelContext, stages: Sequence[nn.Module]
    ) -> None:
        self._parallel = parallel
        self._stages = list(stages)
        self._local_batch_size = config.training.local_batch_size
        batch_per_rank = config.training.batch_per_rank(parallel.dp_size)
        num_microbatches = batch_per_rank // self._local_batch_size
        cp_index, cp_degree = parallel.index("cp"), parallel.degree("cp")
        # A step's loss is the mean of this many losses, each the mean over equally many tokens.
        self._num_losses = num_microbatches * parallel.dp_size * cp_degree
        self._positions = sequence_slice(config.training.seq_len, cp_index, cp_degree)
        self._pipeline: Pipeline | None = None
        if (mesh := parallel.mesh("pp")) is not None:
            self._pipeline = Pipeline(
                self._stages,
                config.parallelism,
                mesh,
                parallel.device,
                num_microbatches=num_microbatches,
                loss=self._loss,
            )

    def accumulate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return this rank's share of the step's mean loss. Add its gradients to the `grad` of
        each weight.

        `inputs` and `labels` are whole sequences; a context-parallel rank uses its slice of them.
        `training.local_batch_size` sequences go through the model at a time. The sum of all ranks'
        shares is the mean over all tokens; the same holds for their gradients. Collective.
        """
        inputs, labels = (
            tokens[:, self._positions.start : self._positions.stop].to(self._parallel.device)
            for tokens in (inputs, labels)
        )
        with loss_context(self._parallel):
            if self._pipeline is None:
                total = self._accumulate_alone(inputs, labels)
            else:
                losses = self._pipeline.run(inputs, labels)
                total = sum(map(full_tensor, losses), torch.zeros((), device=self._parallel.device))
        redistribute_gradients(self._stages)
        return total

    def _accumulate_alone(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Run forward and backward through a model without pipeline stages, `local_batch_size`
        sequences at a time. Return this rank's share of the loss."""
        (model,) = self._stages
        total = torch.zeros((), device=self._parallel.device)
        size = self._local_batch_size
        batches = zip(torch.split(inputs, size), torch.split(labels, size), strict=True)
        for batch_inputs, batch_labels in batches:
            loss = self._loss(model(batch_inputs), batch_labels)
            loss.backward()  # type: ignore[no-untyped-call]
            total += full_tensor(loss.detach())
        return total

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        mean = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return mean / self._num_losses


@contextmanager
def loss_context(parallel: ParallelContext) -> Iterator[None]:
    """Context for the forward pass, the loss and the backward pass.

    With tensor parallelism, the loss is computed from logits that stay sharded by vocabulary. On a
    GPU without FSDP, autocast computes in bfloat16, as FSDP's policy does.
    """
    kind = parallel.device.type
    unsharded = kind != "cpu" and parallel.mesh("dp_replicate", "fsdp") is None
    autocast = torch.autocast(kind, torch.bfloat16) if unsharded else nullcontext()
    with autocast, loss_parallel() if parallel.mesh("tp") is not None else nullcontext():
        yield
