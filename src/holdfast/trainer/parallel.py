"""Process group, device meshes, and the model sharded over them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

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

from holdfast import accelerator
from holdfast.errors import RankError, UsageError
from holdfast.hf.flavors import Flavor
from holdfast.trainer.config import Config
from holdfast.trainer.context import context_parallel_attention, sequence_slice
from holdfast.trainer.model import Attention, Transformer
from holdfast.trainer.moe import Experts
from holdfast.trainer.pipeline import stages_of_rank
from holdfast.trainer.weights import init_weights

TIMEOUT = timedelta(minutes=10)
"""Time limit for all processes to connect, and for each collective."""


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Rank, device and meshes of this process."""

    rank: int
    world_size: int
    device: torch.device
    meshes: tuple[DeviceMesh, ...] = ()
    """Meshes from `build_meshes`; empty for a single process."""

    def mesh(self, *axes: str, keep_last: bool = False) -> DeviceMesh | None:
        """Return the submesh of `axes` that contains this process; None if all axes have degree 1.

        Leading axes of degree 1 are dropped. `keep_last`: keep the last axis even if its degree is
        1, unless there is a single process.
        """
        for mesh in self.meshes:
            if set(axes) <= set(mesh.mesh_dim_names or ()):
                while axes and mesh[axes[0]].size() == 1 and not (keep_last and len(axes) == 1):
                    axes = axes[1:]
                return mesh[axes] if axes else None
        return None

    def degree(self, axis: str) -> int:
        """Return the number of processes along `axis`."""
        mesh = self.mesh(axis)
        return 1 if mesh is None else mesh.size()

    def index(self, axis: str) -> int:
        """Return this process's index along `axis`."""
        mesh = self.mesh(axis)
        return 0 if mesh is None else mesh.get_local_rank()

    @property
    def dp_rank(self) -> int:
        """Index of this process's share of each batch."""
        return self.index("dp_replicate") * self.degree("dp_shard") + self.index("dp_shard")

    @property
    def dp_size(self) -> int:
        """Number of shares of each batch."""
        return self.degree("dp_replicate") * self.degree("dp_shard")


def build_meshes(
    degrees: Mapping[str, int], device: torch.device, ep: int
) -> tuple[DeviceMesh, ...]:
    """Build three meshes of all ranks: one for the weights, one for the weights of the experts, and
    one with the axes in `[parallelism]`. A single process gets none. `ep`: expert-parallel degree.

    Axis `fsdp` joins `dp_shard` and `cp`. The experts are divided over the ranks along `fsdp` and
    `tp`, since ranks along `tp` too hold different tokens between the layers. Ranks along axis `ep`
    hold different experts. Ranks along axis `fsdp_of_experts` shard the weights of the same
    experts. Collective.
    """
    if math.prod(degrees.values()) == 1:
        return ()
    outer = {"pp": degrees["pp"], "dp_replicate": degrees["dp_replicate"]}
    fsdp, tp = degrees["dp_shard"] * degrees["cp"], degrees["tp"]
    weights = {**outer, "fsdp": fsdp, "tp": tp}
    experts = {**outer, "fsdp_of_experts": fsdp * tp // ep, "ep": ep}
    return tuple(
        init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        for axes in (weights, experts, dict(degrees))
    )


def connect() -> Store | None:
    """Connect to the key-value store that the launcher, `torchrun` or `holdfast.trainer.launch`,
    serves for `torch.distributed`.

    Returns None for a single process.
    """
    if "RANK" not in os.environ:
        return None
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    store.set_timeout(TIMEOUT)
    return cast("Store", store)


@contextmanager
def init_parallel(config: Config, store: Store | None) -> Iterator[ParallelContext]:
    """Context with the process group and the meshes. `store`: result of `connect`.

    Collective. Destroys the process group only after success: after a failure other processes may
    be gone, and destroying it could wait for them forever.
    """
    device = _device(int(os.environ.get("LOCAL_RANK", "0")), config)
    if store is None:
        yield ParallelContext(0, 1, device)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"joined/{rank}", "")
    try:
        dist.init_process_group(
            # gloo on GPUs too, since checkpoints exchange values through host memory.
            backend=_backends(device),
            store=PrefixStore("training", store),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
    except RuntimeError as error:
        raise _absent_workers(store, world_size, error) from error
    ep = config.parallelism.expert_parallel_degree
    meshes = build_meshes(config.parallelism.degrees(world_size), device, ep)
    yield ParallelContext(rank, world_size, device, meshes)
    dist.barrier()
    dist.destroy_process_group()


def _absent_workers(store: Store, world_size: int, error: RuntimeError) -> RankError:
    """Return an error that lists the ranks of workers that have not joined."""
    try:
        absent = [rank for rank in range(world_size) if not store.check([f"joined/{rank}"])]
    except RuntimeError:
        absent = []
    named = f"rank {', '.join(map(str, absent))} of {world_size} did not join" if absent else error
    return RankError(
        f"the workers did not connect within {TIMEOUT}: {named}",
        hint="look for an earlier error of these ranks, and at the network between the hosts "
        "(GLOO_SOCKET_IFNAME)",
    )


def _device(local_rank: int, config: Config) -> torch.device:
    # A seed checkpoint is built from the whole model, which may not fit on a GPU.
    if config.checkpoint.create_seed_checkpoint or not (num_gpus := accelerator.num_devices()):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise UsageError(
            f"worker {local_rank} of this machine has no GPU: there are {num_gpus}",
            hint=f"NGPU={num_gpus} starts one worker per GPU; CUDA_VISIBLE_DEVICES= runs all "
            "workers on the CPU",
        )
    return accelerator.use_device(local_rank)


def _backends(device: torch.device) -> str:
    """Return the backends of the process group, by kind of device."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def build_model(
    config: Config, parallel: ParallelContext, vocab_size: int, *, flavor: Flavor | None = None
) -> list[nn.Module]:
    """Build this process's stages of the model, with their initial weights.

    `flavor` replaces the flavor in the settings. Only this process's shards are allocated.
    """
    flavor = flavor or config.model.shape
    stages: list[nn.Module] = []
    cp_mesh, tp_mesh, ep_mesh = parallel.mesh("cp"), parallel.mesh("tp"), parallel.mesh("ep")
    seq_len, num_layers = config.training.seq_len, flavor.num_layers
    pp_index, pp_degree = parallel.index("pp"), parallel.degree("pp")
    for layers in stages_of_rank(num_layers, config.parallelism, pp_index, pp_degree):
        with torch.device("meta"):
            model = Transformer(
                flavor,
                vocab_size=vocab_size,
                seq_len=seq_len,
                recompute=config.activation_checkpoint,
                layers=layers,
                positions=sequence_slice(seq_len, parallel.index("cp"), parallel.degree("cp")),
            )
        if cp_mesh is not None:
            for attention in (m for m in model.modules() if isinstance(m, Attention)):
                attention.attend = context_parallel_attention(cp_mesh)
        if tp_mesh is not None:
            apply_tensor_parallel(model, tp_mesh)
        if ep_mesh is not None:
            for experts in (m for m in model.modules() if isinstance(m, Experts)):
                experts.apply_expert_parallel(ep_mesh)
        apply_fsdp(model, parallel)
        model.to_empty(device=parallel.device)
        init_weights(model, config.training.seed)
        stages.append(model.train())
    return stages


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard every matrix, except those of routers and experts, over the ranks of `mesh`.

    Between layers each rank holds a slice of the sequence: an all-gather precedes a layer's matrix
    products, and a reduce-scatter follows. The logits stay sharded by vocabulary, for
    `gradients.loss_context`.
    """
    sequence = Shard(1)
    outer: dict[str, ParallelStyle] = {}
    if model.first:
        outer["tok_embeddings"] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=sequence
        )
    if model.last:
        outer["norm"] = SequenceParallel()
        outer["output"] = ColwiseParallel(
            input_layouts=sequence, output_layouts=Shard(-1), use_local_output=False
        )
    parallelize_module(model, mesh, outer)
    feed_forward: dict[str, ParallelStyle] = {
        "feed_forward": PrepareModuleInput(
            input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=sequence),
    }
    if model.flavor.experts is not None:
        # Each rank routes the tokens of its slice: see `moe.Experts.apply_expert_parallel`.
        feed_forward = {
            "moe": PrepareModuleInput(
                input_layouts=(sequence,), desired_input_layouts=(sequence,), use_local_output=True
            ),
            "moe.router.gate": SequenceParallel(sequence_dim=0, use_local_output=True),
        }
    head_norms: dict[str, ParallelStyle] = {}
    if model.flavor.head_norm:
        heads = SequenceParallel(sequence_dim=2, use_local_output=True)
        head_norms = {"attention.q_norm": heads, "attention.k_norm": heads}
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
                **feed_forward,
                **head_norms,
            },
        )
    model.tie()


def apply_fsdp(model: Transformer, parallel: ParallelContext) -> None:
    """Shard every weight with FSDP2, which gathers one layer at a time.

    With replicas (HSDP) each replica is sharded, and gradients are summed over all replicas.
    """
    settings: dict[str, Any] = {
        # A pipeline runs its layers once per microbatch. Gathering the weights each time would be
        # slow, so they stay gathered and take more memory.
        "reshard_after_forward": parallel.mesh("pp") is None,
        "mp_policy": MixedPrecisionPolicy(),
    }
    if parallel.device.type != "cpu":
        # Inputs are not cast: hidden states are bfloat16 already, the rotary table needs float32.
        settings["mp_policy"] = MixedPrecisionPolicy(
            torch.bfloat16, torch.float32, cast_forward_inputs=False
        )
    mesh = parallel.mesh("dp_replicate", "fsdp")
    # Experts get FSDP even on a mesh of size 1. Otherwise the FSDP of their layer would shard them.
    experts_mesh = parallel.mesh("dp_replicate", "fsdp_of_experts", keep_last=mesh is not None)
    if experts_mesh is not None:
        for experts in (m for m in model.modules() if isinstance(m, Experts)):
            placement = _expert_placement(experts, experts_mesh.size(-1))
            fully_shard(experts, mesh=experts_mesh, shard_placement_fn=placement, **settings)
    if mesh is not None:
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh, **settings)
        # Embedding and output in one group, since a tied model has one weight for both.
        fully_shard(model, mesh=mesh, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients, since each rank's loss is its share of the step's loss. The default
            # divides while it reduces, which gloo cannot do.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _expert_placement(experts: Experts, degree: int) -> Callable[[nn.Parameter], Shard]:
    """Return a function that selects the dim along which FSDP2 shards a weight over `degree` ranks:
    dim 0 (experts), or dim 1 if dim 0 does not divide evenly and dim 1 does."""
    num_local = experts.num_local

    def placement(weight: nn.Parameter) -> Shard:
        return Shard(1 if num_local % degree and weight.shape[1] % degree == 0 else 0)

    return placement


def redistribute_gradients(stages: Sequence[nn.Module]) -> None:
    """Give each gradient the placements of its weight. Collective.

    Needed without FSDP: tensor parallelism alone leaves the gradients of norms as partial sums, and
    the gradient of the embedding replicated.
    """
    for parameter in (p for stage in stages for p in stage.parameters()):
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full value of a tensor. Collective if it is a `DTensor`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> tuple[Tensor, int]:
    """Return this rank's shard of `tensor`, and the number of ranks that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return tensor, 1
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return tensor.to_local(), math.prod(n for placement, n in sizes if placement.is_replicate())


def sum_over_data(value: Tensor, parallel: ParallelContext) -> float:
    """Return the sum of all ranks' shares of a value, such as the loss. Collective.

    Tensor-parallel ranks hold the same share, which counts once. In a pipeline, only ranks with the
    last stage have a share other than 0.
    """
    if parallel.world_size == 1:
        return float(value.item())
    total = value.detach().clone()
    dist.all_reduce(total)
    return float(total.item()) / parallel.degree("tp")


def num_parameters(stages: Sequence[nn.Module], parallel: ParallelContext) -> int:
    """Count the parameters of the whole model. Collective."""
    count = sum(p.numel() for stage in stages for p in stage.parameters())
    total = torch.tensor(count, device=parallel.device)
    if (mesh := parallel.mesh("pp")) is not None:
        dist.all_reduce(total, group=mesh.get_group())
    return int(total.item())


def raise_from_rank_0(parallel: ParallelContext, error: Exception | None) -> None:
    """Raise rank 0's `error` on every rank; do nothing if it is None. Collective."""
    errors = [error if parallel.rank == 0 else None]
    if parallel.world_size > 1:
        dist.broadcast_object_list(errors, src=0)
    if errors[0] is not None:
        raise errors[0]
