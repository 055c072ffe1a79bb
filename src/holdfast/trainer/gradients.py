"""The gradients of a step: its samples taken through the model, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import loss_parallel

from holdfast.trainer.config import Config
from holdfast.trainer.context import stretch_of
from holdfast.trainer.parallel import Place, settle_gradients, whole
from holdfast.trainer.pipeline import Pipeline


class Gradients:
    """Takes each step's samples through the parts of the model that this process holds."""

    def __init__(self, config: Config, place: Place, model_parts: Sequence[nn.Module]) -> None:
        self._place = place
        self._parts = list(model_parts)
        self._local_batch_size = config.training.local_batch_size
        num_microbatches = config.training.batch_per_rank(place.dp_size) // self._local_batch_size
        # Of how many equal means the loss of a step is the mean.
        self._num_losses = num_microbatches * place.dp_size * place.degree("cp")
        self._stretch = stretch_of(config.training.seq_len, place.index("cp"), place.degree("cp"))
        self._pipeline: Pipeline | None = None
        if (mesh := place.along("pp")) is not None:
            self._pipeline = Pipeline(
                *(self._parts, config.parallelism, mesh, place.device),
                num_microbatches=num_microbatches,
                loss=self._loss,
            )

    def accumulate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """This rank's part of the step's mean loss; leaves its gradients in the model.

        `inputs` and `labels` are this rank's share of the step, of whose sequences it takes its
        stretch; they go through the model `training.local_batch_size` at a time. The parts of all
        ranks add up to the mean over every token, and so do their gradients. Collective.
        """
        inputs, labels = (
            tokens[:, self._stretch.start : self._stretch.stop].to(self._place.device)
            for tokens in (inputs, labels)
        )
        with loss_scope(self._place):
            if self._pipeline is None:
                total = self._one_by_one(inputs, labels)
            else:
                losses = self._pipeline.run(inputs, labels)
                total = sum(map(whole, losses), torch.zeros((), device=self._place.device))
        settle_gradients(self._parts)
        return total

    def _one_by_one(self, inputs: Tensor, labels: Tensor) -> Tensor:
        (model,) = self._parts
        total = torch.zeros((), device=self._place.device)
        size = self._local_batch_size
        for tokens, following in zip(
            torch.split(inputs, size), torch.split(labels, size), strict=True
        ):
            loss = self._loss(model(tokens), following)
            loss.backward()  # type: ignore[no-untyped-call]
            total += whole(loss.detach())
        return total

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        mean = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return mean / self._num_losses


@contextmanager
def loss_scope(place: Place) -> Iterator[None]:
    """Forward, loss and backward go inside.

    Takes the loss from logits cut by vocabulary without gathering them, and gives a GPU that
    shares no weights the precision that FSDP gives the others.
    """
    alone_on_gpu = place.device.type == "cuda" and place.along("dp_replicate", "fsdp") is None
    autocast = torch.autocast("cuda", torch.bfloat16) if alone_on_gpu else nullcontext()
    with autocast, loss_parallel() if place.along("tp") is not None else nullcontext():
        yield
