"""The states that are saved: what a Llama trains, many small tensors, and shards of the former."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

State = Mapping[str, torch.Tensor]
WIDTH, HIDDEN = 1024, 2816


def shapes(nbytes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Float32 weights with the shapes of a Llama's layers, and two moments of each."""
    layer = {
        **{f"attention.w{k}.weight": (WIDTH, WIDTH) for k in "qkvo"},
        **{f"feed_forward.w{k}.weight": (HIDDEN, WIDTH) for k in "13"},
        "feed_forward.w2.weight": (WIDTH, HIDDEN),
        "attention_norm.weight": (WIDTH,),
    }
    held, number = 0, 0
    while held < nbytes:
        for name, shape in layer.items():
            for part in ("layers", "exp_avg", "exp_avg_sq"):
                yield f"{part}.{number}.{name}", shape
                held += 4 * torch.Size(shape).numel()
        number += 1


def llama_like(nbytes: int, make: Callable[..., torch.Tensor] = torch.randn) -> State:
    """Whole tensors, all on this process."""
    return {name: make(shape) for name, shape in shapes(nbytes)}


def small_tensors(count: int) -> State:
    """So many of 4 KiB."""
    return {f"t{number}": torch.randn(1024) for number in range(count)}


def mesh_of(size: int) -> DeviceMesh:
    """All ranks of the process group side by side."""
    return init_device_mesh("cpu", (size,))


def sharded(
    nbytes: int, mesh: DeviceMesh, make: Callable[..., torch.Tensor] = torch.randn, dim: int = 0
) -> State:
    """The same tensors cut evenly over a mesh, by rows as FSDP does, or by columns."""
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes(nbytes):
        along = min(dim, len(shape) - 1)
        local = list(shape)
        local[along] //= mesh.size()
        state[name] = DTensor.from_local(make(local), mesh, [Shard(along)], run_check=False)
    return state


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(state: State) -> int:
    """By this rank."""
    return sum(local(tensor).nbytes for tensor in state.values())


def same(one: State, other: State) -> bool:
    """Whether this rank holds the same bits of both."""
    return all(torch.equal(local(tensor), local(other[name])) for name, tensor in one.items())


def rank() -> int:
    """Of this process; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0
