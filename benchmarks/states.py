"""States to save: a Llama's training state, many small tensors, and shards of the former."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

State = Mapping[str, torch.Tensor]
WIDTH, HIDDEN = 1024, 2816


def shapes(nbytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield at least `nbytes` of float32 Llama weights, each with its two AdamW moments."""
    layer = {
        **{f"attention.w{k}.weight": (WIDTH, WIDTH) for k in "qkvo"},
        **{f"feed_forward.w{k}.weight": (HIDDEN, WIDTH) for k in "13"},
        "feed_forward.w2.weight": (WIDTH, HIDDEN),
        "attention_norm.weight": (WIDTH,),
    }
    total, number = 0, 0
    while total < nbytes:
        for name, shape in layer.items():
            for group in ("layers", "exp_avg", "exp_avg_sq"):
                yield f"{group}.{number}.{name}", shape
                total += 4 * torch.Size(shape).numel()
        number += 1


def llama_like(nbytes: int, make: Callable[..., torch.Tensor] = torch.randn) -> State:
    """Make the unsharded tensors, all in this process."""
    return {name: make(shape) for name, shape in shapes(nbytes)}


def small_tensors(count: int) -> State:
    """Make `count` tensors of 4 KiB."""
    return {f"t{number}": torch.randn(1024) for number in range(count)}


def mesh_of(size: int) -> DeviceMesh:
    """Make a one-dimensional mesh of all `size` ranks."""
    return init_device_mesh("cpu", (size,))


def sharded(
    nbytes: int, mesh: DeviceMesh, make: Callable[..., torch.Tensor] = torch.randn, dim: int = 0
) -> State:
    """Make the tensors of `llama_like` sharded evenly by rows, as FSDP does, or along `dim`."""
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes(nbytes):
        shard_dim = min(dim, len(shape) - 1)
        local_shape = list(shape)
        local_shape[shard_dim] //= mesh.size()
        placements = [Shard(shard_dim)]
        state[name] = DTensor.from_local(make(local_shape), mesh, placements, run_check=False)
    return state


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(state: State) -> int:
    """Count the bytes of this rank's shards."""
    return sum(local(tensor).nbytes for tensor in state.values())


def same_bits(a: State, b: State) -> bool:
    """Tell whether this rank's shards of both states are equal."""
    return all(torch.equal(local(tensor), local(b[name])) for name, tensor in a.items())


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0
