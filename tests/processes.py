"""Ranks for the tests: processes of a gloo group, forked from a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["processes", "torch.distributed.checkpoint", "holdfast.trainer.train"]
)


def run_processes(
    size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Run `work(rank, size, *args)` in each of `size` processes of one gloo group. Returns the
    results by rank.

    `work` must be a function of a module. The first error of a rank is raised here, with its
    traceback. Ranks that hang are killed.
    """
    with Job(size, work, *args) as job:
        return job.results(timeout_s)


class Job:
    """Context with running ranks. At its end, it kills those that are still running."""

    def __init__(self, size: int, work: Callable[..., Any], *args: Any) -> None:
        # Made here and not by rank 0, so that no other job takes the port before the ranks connect.
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        pipes = [_FORKED.Pipe(duplex=False) for _ in range(size)]
        self._pipes = [here for here, _ in pipes]
        self._ranks = [
            _FORKED.Process(target=_rank, args=(rank, size, self._store.port, there, work, args))
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(self._ranks, pipes, strict=True):
            process.start()
            there.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(range(len(self._ranks)))
        for process, pipe in zip(self._ranks, self._pipes, strict=True):
            process.join(30)
            process.close()
            pipe.close()

    def kill(self, ranks: Iterable[int]) -> None:
        """Send SIGKILL to these ranks."""
        for rank in ranks:
            self._ranks[rank].kill()

    def signal(self, ranks: Iterable[int], number: int) -> None:
        """Send a signal to these ranks."""
        for rank in ranks:
            os.kill(self._ranks[rank].pid or 0, number)

    def statuses(self) -> list[int | None]:
        """Return the exit status of each rank, None while it runs."""
        return [process.exitcode for process in self._ranks]

    def wait(self, timeout_s: float) -> None:
        """Wait until every rank has ended."""
        for rank, process in enumerate(self._ranks):
            process.join(timeout_s)
            if process.is_alive():
                raise TimeoutError(f"rank {rank} is still there after {timeout_s} s")

    def results(self, timeout_s: float) -> list[Any]:
        """Wait for the results of all ranks, and raise the first error."""
        results: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout_s):
                raise TimeoutError(f"rank {rank} said nothing for {timeout_s} s")
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                self._ranks[rank].join(5)
                exit_code = self._ranks[rank].exitcode
                results.append(RuntimeError(f"rank {rank} died: exit {exit_code}"))
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self.wait(30)
        return results


def _rank(
    rank: int, size: int, port: int, out: Connection, work: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")  # The parent serves the store.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    result: Any
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        # A rank that ends its group while another still connects breaks the start of that one.
        dist.barrier()
        result = work(rank, size, *args)
        # No rank may end while another still waits for it in a collective.
        dist.barrier()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - handed to the test
        result = AssertionError(f"rank {rank}: {''.join(traceback.format_exception(error))}")
    # `send` would pass a tensor by shared memory, which this process frees when it ends.
    out.send_bytes(pickle.dumps(result))
    out.close()
    # Skips the destruction of dozens of process groups, which is not under test.
    os._exit(0)
