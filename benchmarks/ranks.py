"""Run a function on several processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


def run_on_ranks(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work(*args)` on `size` ranks, and return rank 0's result.

    `work` must be a function of a module, since it is pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.peers"])
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, results, work, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
    if failed:
        raise RuntimeError(f"exit status by rank: {failed}")
    return results.get()


def free_port() -> int:
    """Find a free port of the loopback address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _rank(rank: int, size: int, port: int, results: Any, work: Any, args: Any) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.options import silence_warnings

    torch.set_num_threads(1)
    silence_warnings()
    address = f"tcp://127.0.0.1:{port}"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=address)
    result = work(*args)
    if rank == 0:
        results.put(result)
    dist.barrier()
    os._exit(0)
