"""Real processes on gloo for the tests: torch is imported once, every rank is forked from there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["processes", "torch.distributed.checkpoint", "holdfast.engine.load"]
)


def run_processes(
    size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """What `work(rank, size, *args)` gives in each of `size` processes of one gloo group.

    `work` is a function of a module. The first error of a rank is raised here, with its traceback;
    ranks that hang are killed.
    """
    port = free_port()
    pipes = [_FORKED.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        _FORKED.Process(target=_rank, args=(rank, size, port, pipes[rank][1], work, args))
        for rank in range(size)
    ]
    for process, (_, there) in zip(ranks, pipes, strict=True):
        process.start()
        there.close()
    results: list[Any] = []
    try:
        for rank, (here, _) in enumerate(pipes):
            if not here.poll(timeout_s):
                raise TimeoutError(f"rank {rank} said nothing for {timeout_s} s")
            try:
                results.append(pickle.loads(here.recv_bytes()))
            except EOFError:
                ranks[rank].join(5)
                results.append(RuntimeError(f"rank {rank} died: exit {ranks[rank].exitcode}"))
        for process in ranks:
            process.join(30)
    finally:
        for process in ranks:
            process.kill()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _rank(
    rank: int, size: int, port: int, out: Connection, work: Callable[..., Any], args: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    result: Any
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        result = work(rank, size, *args)
        dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - handed to the test
        result = AssertionError(f"rank {rank}: {''.join(traceback.format_exception(error))}")
    # Not `send`, which would hand over a tensor's memory, gone when this process ends.
    out.send_bytes(pickle.dumps(result))
    out.close()
