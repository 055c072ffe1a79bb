"""FSDP2 with background saves.

Run the command again with another number of processes: the run resumes.

    torchrun --standalone --nproc_per_node 2 fsdp2.py
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import holdfast


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    model.to(device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())

    config = holdfast.CheckpointConfig(enable=True, interval=10, async_mode="async")
    with holdfast.CheckpointManager(
        "outputs/fsdp2", model=model, optimizers=optimizer, config=config
    ) as manager:
        start = manager.load()
        if dist.get_rank() == 0:
            print(f"starting at step {start} on {dist.get_world_size()} ranks")
        for step in range(start + 1, steps + 1):
            model(torch.randn(16, 8, device=device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.save(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
