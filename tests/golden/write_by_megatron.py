"""Write a small checkpoint of Megatron in `torch_dist` format, by two ranks of tensor parallelism:

    torchrun --nproc_per_node 2 tests/golden/write_by_megatron.py FOLDER

The folder `megatron` was made with megatron-core 0.16.1 on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WEIGHT = torch.arange(48.0).view(8, 6)
BIAS = torch.arange(6.0)


def write(folder: Path) -> None:
    """Save a weight that is divided by rows, a bias that both ranks have, and values."""
    from megatron.core import (  # type: ignore[import-not-found]
        dist_checkpointing,
        parallel_state,
    )

    # Megatron waits for a GPU, and asks for its number.
    cuda: Any = torch.cuda
    cuda.synchronize, cuda.current_device = (lambda: None), (lambda: "cpu")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    rank, sharded = dist.get_rank(), dist_checkpointing.ShardedTensor.from_rank_offsets
    rows = WEIGHT[rank * 4 : rank * 4 + 4].clone()
    model = {
        "weight": sharded("decoder.layers.0.weight", rows, (0, rank, 2)),
        "bias": sharded("decoder.bias", BIAS.clone(), replica_id=rank),
    }
    (folder / "iter_0000007").mkdir(parents=True, exist_ok=True)
    state = {"model": model, "args": {"lr": 0.1}, "iteration": 7}
    dist_checkpointing.save(state, str(folder / "iter_0000007"))
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


# Processes that write the files import this module.
if __name__ == "__main__":
    write(Path(sys.argv[1]))
