"""`python -m holdfast.trainer.launch`: several workers on this machine.

What `torchrun --nproc_per_node NGPU -m holdfast.trainer` does on one machine, in less time and with
fewer words: torch is imported once and the workers are forked from there, a worker that fails ends
the run with its own message and exit status, and no worker outlives the launcher. On several
machines `torchrun` starts the same `holdfast.trainer`.

The environment has `NGPU`, the number of workers. By default there are as many as GPUs, and two
where there is none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from holdfast.arguments import not_installed
from holdfast.errors import HoldfastError, UsageError
from holdfast.trainer.arguments import get_ready, print_help, read_config, wants_help
from holdfast.trainer.config import Config

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

NUM_WORKERS = 2
"""Where there is no GPU."""

GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-ctrl-gpu")
"""What the kernel shows where there may be GPUs: of NVIDIA, of those in WSL, of AMD, of Jetsons."""

GRACE_S = 10
"""How long workers may take to end, beyond `checkpoint.stop_deadline_s`, before they are killed."""

PR_SET_PDEATHSIG = 1
"""From Linux' `sys/prctl.h`: which signal the parent's death sends."""


def main(arguments: list[str]) -> int:
    """Start the workers and wait for them; the exit status."""
    if wants_help(arguments):
        print_help("./run_train.sh")
    try:
        config = read_config(arguments)
        num_workers = _num_workers(config)
        get_ready(config, arguments)
        return Workers(config, num_workers).wait()
    except ImportError as error:
        return _ended(not_installed(error, "training"))
    except HoldfastError as error:
        return _ended(error)
    except KeyboardInterrupt:
        return 130


def _ended(error: HoldfastError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return error.exit_status


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
        # Holds one byte, which the first worker that has an error to report takes.
        self._reports, token = os.pipe()
        os.write(token, b"1")
        os.close(token)
        # Bound before the workers know its number: nobody else can take the port.
        listener = socket.create_server(("127.0.0.1", 0), backlog=2 * num_workers)
        for rank in range(num_workers):
            pid = os.fork()
            if pid == 0:
                _run_worker(config, rank, num_workers, listener, self._is_first)
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
            if 0 < status < 128 and self._is_first():
                said = f"error: rank {rank} of {self._num_workers} ended with status {status}"
                sys.stderr.write(f"{said}, and did not say why\n")
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

    def _is_first(self) -> bool:
        """Whether nobody has reported an error yet: true once, in all of these processes."""
        return os.read(self._reports, 1) == b"1"

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


def _run_worker(
    config: Config,
    rank: int,
    num_workers: int,
    listener: socket.socket,
    is_first: Callable[[], bool],
) -> None:
    """Be worker `rank`; never returns. `is_first` is as in `worker.work`."""
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

        status = work(config, is_first)
    except KeyboardInterrupt:
        status = 130
    except BaseException:  # noqa: BLE001 - nothing above would hear of it
        if is_first():
            sys.stderr.write(f"rank {rank} failed:\n{traceback.format_exc()}")
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


def _num_workers(config: Config) -> int:
    """As many workers as `NGPU` says; else as there are GPUs, or as many of these as the settings
    can be shared among, which is said.

    Raises:
        UsageError: no number, or settings that do not fit it.
    """
    text = os.environ.get("NGPU", "").strip()
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(
                f"`NGPU` in the environment must be a number of workers, found: {text!r}",
                hint="NGPU=2; without it there are as many as GPUs",
            )
        config.check(int(text))
        return int(text)
    num_gpus = count_gpus()
    fitting = [count for count in range(1, num_gpus + 1) if _fits(config, count)]
    if fitting and fitting[-1] < num_gpus:
        sys.stderr.write(
            f"{fitting[-1]} of {num_gpus} GPUs are used: the settings cannot be shared among all. "
            f"NGPU={num_gpus} says why\n"
        )
        return fitting[-1]
    count = num_gpus or NUM_WORKERS
    config.check(count)
    return count


def _fits(config: Config, num_workers: int) -> bool:
    try:
        config.check(num_workers)
    except UsageError:
        return False
    return True


def count_gpus() -> int:
    """GPUs that torch can use on this machine.

    Asked in a process of its own: where CUDA was started, workers forked from there cannot use it.
    """
    if not any(map(os.path.exists, GPUS)):
        return 0  # The kernel knows of none: there is no need to wait for torch.
    import torch

    pid = os.fork()
    if pid == 0:
        try:
            os._exit(min(torch.cuda.device_count(), 255))
        finally:
            os._exit(0)
    _, ended = os.waitpid(pid, 0)
    return max(os.waitstatus_to_exitcode(ended), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
