"""`python -m holdfast.trainer.launch`: several workers on this machine.

What `torchrun --nproc_per_node NGPU -m holdfast.trainer` does on one machine, in less time and with
fewer words: torch is imported once and the workers are forked from there, a worker that fails ends
the run with its own message and exit status, and no worker outlives the launcher. On several
machines `torchrun` starts the same `holdfast.trainer`.

The environment has `NGPU`, the number of workers (default: 2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from holdfast.errors import HoldfastError, UsageError
from holdfast.trainer.arguments import get_ready, print_help, read_config, wants_help
from holdfast.trainer.config import Config

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

GRACE_S = 10
"""How long workers may take to end, beyond `checkpoint.stop_deadline_s`, before they are killed."""

PR_SET_PDEATHSIG = 1
"""From Linux' `sys/prctl.h`: which signal the parent's death sends."""


def main(arguments: list[str]) -> int:
    """Start the workers and wait for them; the exit status."""
    if wants_help(arguments):
        print_help("./run_train.sh")
    try:
        num_workers = _num_workers()
        config = read_config(arguments)
        config.check(num_workers)
    except HoldfastError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    get_ready(config)
    try:
        return Workers(config, num_workers).wait()
    except KeyboardInterrupt:
        return 130


class Workers:
    """Forked workers, and the signals that go to them."""

    def __init__(self, config: Config, num_workers: int) -> None:
        """Start them: they run once this returns."""
        # Before torch reads it, and so that the workers together have a thread per core.
        threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        # All workers are on this machine, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        import holdfast.trainer.worker  # noqa: F401 - imported here, it costs each worker nothing

        self._num_workers = num_workers
        self._asked_to_stop = False
        self._patience_s = int(config.checkpoint.stop_deadline_s) + GRACE_S
        self._running: dict[int, int] = {}
        self._status: int | None = None
        # Bound before the workers know its number: nobody else can take the port.
        listener = socket.create_server(("127.0.0.1", 0), backlog=2 * num_workers)
        for rank in range(num_workers):
            pid = os.fork()
            if pid == 0:
                _run_worker(config, rank, num_workers, listener)
            self._running[pid] = rank
        self._store = _serve_store(listener, num_workers)
        passed_on = {"SIGINT", "SIGTERM", "SIGHUP", *config.checkpoint.stop_signals}
        for name in sorted(passed_on):
            signal.signal(signal.Signals[name], self._pass_on)
        signal.signal(signal.SIGALRM, self._kill)

    def wait(self) -> int:
        """Wait until all have ended; the status of the first that failed, else 0."""
        while self._running:
            pid, ended = os.wait()
            rank = self._running.pop(pid, None)
            status = os.waitstatus_to_exitcode(ended)
            if rank is None or status == 0 or self._status is not None:
                continue
            self._status = status if status > 0 else 128 - status
            if self._asked_to_stop:
                continue  # The others are about to end too, each in its own time.
            if status < 0:
                name = signal.Signals(-status).name
                sys.stderr.write(
                    f"error: rank {rank} of {self._num_workers} was ended by {name}\n"
                    "hint: ./run_train.sh goes on from the newest checkpoint"
                    + ("; out of memory?\n" if name == "SIGKILL" else "\n")
                )
            self._send(signal.SIGTERM)
            signal.alarm(GRACE_S)
        signal.alarm(0)
        return self._status or 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._asked_to_stop = True
        self._send(signal.Signals(number))
        signal.alarm(self._patience_s)

    def _kill(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        # Pids in here have not been waited for, so none can belong to somebody else.
        for pid in self._running:
            os.kill(pid, number)


def _run_worker(config: Config, rank: int, num_workers: int, listener: socket.socket) -> None:
    """Be worker `rank`; never returns."""
    status = 1
    try:
        # Away from the terminal's ^C, which the launcher passes on: once, to all.
        os.setpgid(0, 0)
        # In the background a shell has ^C ignored, which Python takes over.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        port = listener.getsockname()[1]
        listener.close()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_workers),
            "LOCAL_WORLD_SIZE": str(num_workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # The launcher serves the store, so that it outlives rank 0.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        from holdfast.trainer.worker import work

        status = work(config)
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: what the launcher has to clean up is not this process's.
        os._exit(status)


def _serve_store(listener: socket.socket, num_workers: int) -> TCPStore:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        num_workers,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _num_workers() -> int:
    text = os.environ.get("NGPU", "2")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"`NGPU` in the environment is the number of workers, found: {text!r}", hint="NGPU=2"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
