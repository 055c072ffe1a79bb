"""Processes, the mesh that they form, and a model spread over it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from holdfast.errors import UsageError
from holdfast.trainer.config import Config
from holdfast.trainer.model import Transformer
from holdfast.trainer.weights import init_weights


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among all that train together."""

    rank: int
    """Its number among all processes."""

    world_size: int
    """How many there are."""

    device: torch.device
    """What it computes on."""

    mesh: DeviceMesh | None = None
    """All processes by axis; None where there is one alone."""

    store: Store | None = None
    """Shared by all processes before and beside the collectives; None in a lone process."""

    def degree(self, axis: str) -> int:
        """Number of processes along `axis`."""
        return 1 if self.mesh is None else self.mesh[axis].size()

    def along(self, axis: str) -> DeviceMesh | None:
        """The mesh of the processes along `axis` through this one; None where it stands alone."""
        return None if self.mesh is None or self.degree(axis) == 1 else self.mesh[axis]

    @property
    def dp_rank(self) -> int:
        """Which share of each batch this process trains on."""
        return 0 if self.mesh is None else self.mesh["dp_shard"].get_local_rank()

    @property
    def dp_size(self) -> int:
        """How many shares each batch has."""
        return self.degree("dp_shard")


@contextmanager
def join(config: Config) -> Iterator[Place]:
    """This process's place among those that `torchrun` or `holdfast.trainer.launch` started.

    Collective: returns once all have come. Leaves the process group only after success: after a
    failure the others may be gone, and parting from them could take forever.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        yield Place(rank, world_size, device)
        return
    timeout = timedelta(minutes=10)
    store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    dist.init_process_group(
        # Both: checkpoints gather plain values through memory also where training is on GPUs.
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("training", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    degrees = config.parallelism.degrees(world_size)
    mesh = None
    if world_size > 1:
        mesh = init_device_mesh(device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
    yield Place(rank, world_size, device, mesh, store)
    dist.barrier()
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"worker {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}",
            hint=f"start as many workers as there are GPUs: NGPU={torch.cuda.device_count()}",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def build_model(config: Config, place: Place, vocab_size: int) -> list[nn.Module]:
    """The parts of the model that this process holds, with their initial weights.

    One part for now: a pipeline stage that holds several has several. Only this process's shards
    ever take memory.
    """
    with torch.device("meta"):
        model = Transformer(
            config.model.shape,
            vocab_size=vocab_size,
            seq_len=config.training.seq_len,
            recompute=config.activation_checkpoint.mode == "full",
        )
    if (tp_mesh := place.along("tp")) is not None:
        split_matrices(model, tp_mesh)
    if (dp_mesh := place.along("dp_shard")) is not None:
        shard_weights(model, dp_mesh, place.device)
    model.to_empty(device=place.device)
    init_weights(model, config.training.seed)
    model.train()
    return [model]


def split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor parallel: each rank holds a slice of every matrix.

    Between blocks each rank has a slice of the sequence; it is gathered where a block multiplies
    and scattered again where the partial sums of the ranks are added up. The logits stay cut by
    vocabulary: see `loss_scope`.
    """
    sequence = Shard(1)
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence)
    logits = ColwiseParallel(
        input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False
    )
    parallelize_module(
        model, mesh, {"tok_embeddings": embedding, "norm": SequenceParallel(), "output": logits}
    )
    for layer in model.layers.values():
        parallelize_module(
            layer,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(sequence, None), desired_input_layouts=(Replicate(), None)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=sequence),
                "ffn_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(
                    input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
                ),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=sequence),
            },
        )
    model.tie()


def shard_weights(model: Transformer, mesh: DeviceMesh, device: torch.device) -> None:
    """FSDP: each rank holds a slice of every weight, and gathers a block when it is its turn."""
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embedding and output together, since a tied model has one weight for both.
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def loss_scope(place: Place) -> Iterator[None]:
    """Forward, loss and backward go inside.

    Takes the loss from logits cut by vocabulary without gathering them, and gives a GPU that
    shares no weights the precision that FSDP gives the others.
    """
    alone_on_gpu = place.device.type == "cuda" and place.along("dp_shard") is None
    autocast = torch.autocast("cuda", torch.bfloat16) if alone_on_gpu else nullcontext()
    with autocast, loss_parallel() if place.along("tp") is not None else nullcontext():
        yield


def settle_gradients(model_parts: Sequence[nn.Module]) -> None:
    """Lay each gradient out as its weight is. Collective.

    FSDP does so itself. Tensor parallelism alone leaves the gradients of the norms as sums that
    are still to be taken over the ranks, and that of the embedding whole on each of them.
    """
    for parameter in (p for part in model_parts for p in part.parameters()):
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    """The value behind a sharded or partial scalar. Collective where it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_share(tensor: Tensor) -> tuple[Tensor, int]:
    """The piece of `tensor` that this rank holds, and how many ranks hold the same piece."""
    if not isinstance(tensor, DTensor):
        return tensor, 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return tensor.to_local(), math.prod(n for placement, n in sizes if placement.is_replicate())


def mean_over_data(value: Tensor, place: Place) -> float:
    """`value`, of which each data-parallel rank has its own, averaged over them. Collective."""
    if (mesh := place.along("dp_shard")) is None:
        return float(value.item())
    total = value.detach().clone()
    dist.all_reduce(total, group=mesh.get_group())
    return float(total.item()) / mesh.size()


def first_then_all(place: Place, error: Exception | None) -> None:
    """Raise on every rank what rank 0 met. Collective: rank 0 passes its error, or None."""
    if place.world_size == 1:
        carried = [error]
    else:
        carried = [error if place.rank == 0 else None]
        dist.broadcast_object_list(carried, src=0)
    if carried[0] is not None:
        raise carried[0]
