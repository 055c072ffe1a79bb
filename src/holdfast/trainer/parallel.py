"""Processes, the meshes that they form, and a model spread over them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from holdfast.errors import UsageError
from holdfast.trainer.config import ActivationCheckpointConfig, Config
from holdfast.trainer.context import attend_across, stretch_of
from holdfast.trainer.model import Attention, Recompute, Transformer
from holdfast.trainer.moe import Experts
from holdfast.trainer.pipeline import parts_of
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

    meshes: tuple[DeviceMesh, ...] = ()
    """All processes by axis, in each of the ways that `lay_out` gives; none in a lone process."""

    store: Store | None = None
    """Shared by all processes before and beside the collectives; None in a lone process."""

    def along(self, *axes: str, or_alone: bool = False) -> DeviceMesh | None:
        """The mesh of the processes along `axes` through this one.

        Leading axes of degree 1 are left out. Where none is left, None; with `or_alone` the last
        one, unless this is a lone process.
        """
        for mesh in self.meshes:
            if set(axes) <= set(mesh.mesh_dim_names or ()):
                while axes and mesh[axes[0]].size() == 1 and not (or_alone and len(axes) == 1):
                    axes = axes[1:]
                return mesh[axes] if axes else None
        return None

    def degree(self, axis: str) -> int:
        """Number of processes along `axis`."""
        mesh = self.along(axis)
        return 1 if mesh is None else mesh.size()

    def index(self, axis: str) -> int:
        """Which of the processes along `axis` this one is."""
        mesh = self.along(axis)
        return 0 if mesh is None else mesh.get_local_rank()

    @property
    def dp_rank(self) -> int:
        """Which share of each batch this process trains on."""
        return self.index("dp_replicate") * self.degree("dp_shard") + self.index("dp_shard")

    @property
    def dp_size(self) -> int:
        """How many shares each batch has."""
        return self.degree("dp_replicate") * self.degree("dp_shard")


def lay_out(degrees: Mapping[str, int], device: torch.device, ep: int) -> tuple[DeviceMesh, ...]:
    """The meshes of all processes: as weights lie on them, as experts do, and as `[parallelism]`
    names the axes.

    `fsdp` are the ranks that share one copy of the weights: those that share the sequences too,
    which have as little reason to keep a copy each as those that share the batch. Experts are
    shared by all ranks that have tokens of their own, which between the blocks those of tensor
    parallelism have too: `ep` neighbours have different experts, and the `fsdp_of_experts` share
    the weights of each. Collective.
    """
    if math.prod(degrees.values()) == 1:
        return ()
    weights = {
        "pp": degrees["pp"],
        "dp_replicate": degrees["dp_replicate"],
        "fsdp": degrees["dp_shard"] * degrees["cp"],
        "tp": degrees["tp"],
    }
    experts = {
        "pp": degrees["pp"],
        "dp_replicate": degrees["dp_replicate"],
        "fsdp_of_experts": degrees["dp_shard"] * degrees["cp"] * degrees["tp"] // ep,
        "ep": ep,
    }
    return tuple(
        init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        for axes in (weights, experts, dict(degrees))
    )


TIMEOUT = timedelta(minutes=10)
"""For other processes to come, and for a collective."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """The processes of a run, before they do anything together."""

    rank: int
    world_size: int
    store: Store
    """Shared by all of them."""


def meet() -> Meeting | None:
    """Where the processes that `torchrun` or `holdfast.trainer.launch` started find each other;
    None in a lone process."""
    if "RANK" not in os.environ:
        return None
    store, rank, world_size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    store.set_timeout(TIMEOUT)
    return Meeting(rank, world_size, store)


@contextmanager
def join(config: Config, meeting: Meeting | None) -> Iterator[Place]:
    """This process's place among those that it has met.

    Collective: returns once all have come. Leaves the process group only after success: after a
    failure the others may be gone, and parting from them could take forever.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", "0")), config)
    if meeting is None:
        yield Place(0, 1, device)
        return
    rank, world_size, store = meeting.rank, meeting.world_size, meeting.store
    dist.init_process_group(
        # Both: checkpoints gather plain values through memory also where training is on GPUs.
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("training", store),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    ep = config.parallelism.expert_parallel_degree
    meshes = lay_out(config.parallelism.degrees(world_size), device, ep)
    yield Place(rank, world_size, device, meshes, store)
    dist.barrier()
    dist.destroy_process_group()


def _device(local_rank: int, config: Config) -> torch.device:
    # A seed is the whole model, which no GPU need have room for.
    if config.checkpoint.create_seed_checkpoint or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"worker {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}",
            hint=f"NGPU={torch.cuda.device_count()} starts as many workers as there are GPUs, "
            "CUDA_VISIBLE_DEVICES= lets all of them run on the CPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def build_model(config: Config, place: Place, vocab_size: int) -> list[nn.Module]:
    """The parts of the model that this process holds, with their initial weights.

    One part, but where a rank of a pipeline holds several stages. Only this process's shards ever
    take memory.
    """
    parts: list[nn.Module] = []
    cp_mesh, tp_mesh = place.along("cp"), place.along("tp")
    seq_len = config.training.seq_len
    for part in parts_of(
        config.model.shape.num_layers, config.parallelism, place.index("pp"), place.degree("pp")
    ):
        with torch.device("meta"):
            model = Transformer(
                config.model.shape,
                vocab_size=vocab_size,
                seq_len=seq_len,
                recompute=_recompute(config.activation_checkpoint),
                part=part,
                positions=stretch_of(seq_len, place.index("cp"), place.degree("cp")),
            )
        if cp_mesh is not None:
            for attention in (m for m in model.modules() if isinstance(m, Attention)):
                attention.attend = attend_across(cp_mesh)
        if tp_mesh is not None:
            split_matrices(model, tp_mesh)
        if (ep_mesh := place.along("ep")) is not None:
            for experts in (m for m in model.modules() if isinstance(m, Experts)):
                experts.share(ep_mesh)
        shard_weights(model, place)
        model.to_empty(device=place.device)
        init_weights(model, config.training.seed)
        parts.append(model.train())
    return parts


def _recompute(config: ActivationCheckpointConfig) -> Recompute:
    if config.mode != "selective":
        return Recompute(every=config.mode == "full")
    if config.selective_ac_option == "op":
        return Recompute(every=1, keep_products=True)
    return Recompute(every=int(config.selective_ac_option))


def split_matrices(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor parallel: each rank holds a slice of every matrix.

    Between blocks each rank has a slice of the sequence; it is gathered where a block multiplies
    and scattered again where the partial sums of the ranks are added up. The logits stay cut by
    vocabulary: see `gradients.loss_scope`.
    """
    sequence = Shard(1)
    ends: dict[str, ParallelStyle] = {}
    if model.part.first:
        ends["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence)
    if model.part.last:
        ends["norm"] = SequenceParallel()
        ends["output"] = ColwiseParallel(
            input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False
        )
    parallelize_module(model, mesh, ends)
    local = PrepareModuleInput(
        input_layouts=(sequence,), desired_input_layouts=(sequence,), use_local_output=True
    )
    widened: dict[str, ParallelStyle] = {
        "feed_forward": PrepareModuleInput(
            input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=sequence),
    }
    if model.flavor.experts is not None:
        # Each rank sends the tokens of its slice to their experts: see `moe.Experts.share`.
        widened = {
            "moe": local,
            "moe.router.gate": SequenceParallel(sequence_dim=0, use_local_output=True),
        }
    if model.flavor.head_norm:
        heads = SequenceParallel(sequence_dim=2, use_local_output=True)
        widened |= {"attention.q_norm": heads, "attention.k_norm": heads}
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
                **widened,
            },
        )
    model.tie()


def shard_weights(model: Transformer, place: Place) -> None:
    """FSDP: each rank holds a slice of every weight, and gathers a block when it is its turn.

    With replicas (HSDP) the slices are those of one replica, and gradients are summed over all.
    """
    settings: dict[str, Any] = {
        # A pipeline goes through its blocks once for each microbatch: gathering them each time
        # would cost more than keeping them.
        "reshard_after_forward": place.along("pp") is None,
        "mp_policy": MixedPrecisionPolicy(),
    }
    if place.device.type == "cuda":
        # Inputs stay as they are: hidden states are bfloat16 already, rotary angles need float32.
        settings["mp_policy"] = MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, cast_forward_inputs=False
        )
    mesh = place.along("dp_replicate", "fsdp")
    # Where each rank has its experts for itself, the block around must not take them for its own.
    experts_mesh = place.along("dp_replicate", "fsdp_of_experts", or_alone=mesh is not None)
    for experts in (m for m in model.modules() if isinstance(m, Experts)):
        if experts_mesh is not None:
            placement = _placement_of_experts(experts, experts_mesh.size(-1))
            fully_shard(experts, mesh=experts_mesh, shard_placement_fn=placement, **settings)
    if mesh is not None:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh, **settings)
        # Embedding and output together, since a tied model has one weight for both.
        fully_shard(model, mesh=mesh, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: each rank's loss is its part of the whole step's. gloo has no
            # reduction that divides too, so a factor has to be said to come after the sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _placement_of_experts(experts: Experts, degree: int) -> Callable[[nn.Parameter], Shard]:
    """By expert where that is even, else by rows where that is, so that no rank stands idle."""
    num_local = experts.num_local

    def placement(weight: nn.Parameter) -> Shard:
        return Shard(1 if num_local % degree and weight.shape[1] % degree == 0 else 0)

    return placement


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


def sum_over_data(value: Tensor, place: Place) -> float:
    """The whole of `value`, of which each rank has the part of its own tokens. Collective.

    Ranks that share their tokens, those of tensor parallelism, have the same part; of a pipeline
    the last rank has it, the others have nothing.
    """
    if place.world_size == 1:
        return float(value.item())
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total.item()) / place.degree("tp")


def num_parameters(model_parts: Sequence[nn.Module], place: Place) -> int:
    """Of the whole model, however it lies over the ranks. Collective."""
    held = sum(p.numel() for part in model_parts for p in part.parameters())
    total = torch.tensor(held, device=place.device)
    if (mesh := place.along("pp")) is not None:
        dist.all_reduce(total, group=mesh.get_group())
    return int(total.item())


def first_then_all(place: Place, error: Exception | None) -> None:
    """Raise on every rank what rank 0 met. Collective: rank 0 passes its error, or None."""
    if place.world_size == 1:
        carried = [error]
    else:
        carried = [error if place.rank == 0 else None]
        dist.broadcast_object_list(carried, src=0)
    if carried[0] is not None:
        raise carried[0]
