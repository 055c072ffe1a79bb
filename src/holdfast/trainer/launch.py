"""`python -m holdfast.trainer.launch`: run several workers on this machine.

Replaces `torchrun --nproc_per_node NGPU -m holdfast.trainer` and starts faster: it imports torch
once and forks the workers. A worker that fails ends the run with its own message and exit status,
and no worker outlives the launcher. Runs on several machines need `torchrun`.

The environment variable `NGPU` is the number of workers. By default it is the number of GPUs, or
two on a machine without GPUs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from types import FrameType

from holdfast.arguments import not_installed
from holdfast.errors import HoldfastError, UsageError
from holdfast.trainer.arguments import prepare_start, print_requested_help, read_config, report
from holdfast.trainer.config import Config

NUM_CPU_WORKERS = 2
"""Number of workers on a machine without GPUs."""

GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-ctrl-gpu")
"""Device files of GPU drivers: NVIDIA, WSL, AMD, Jetson."""

GRACE_S = 10
"""Seconds in which workers must end before they are killed, after another worker has failed. After
a stop signal, `checkpoint.stop_deadline_s` is added."""

PR_SET_PDEATHSIG = 1
"""Option of Linux' `prctl` (`sys/prctl.h`): signal to receive when the parent dies."""


def main(arguments: list[str]) -> int:
    """Start the workers, wait for them, and return the exit status."""
    print_requested_help(arguments, "./run_train.sh")
    try:
        config = read_config(arguments)
        num_workers = _num_workers(config)
        prepare_start(config, arguments)
        return Workers(config, num_workers).wait()
    except ImportError as error:
        return report(not_installed(error, "training"))
    except HoldfastError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130


class Workers:
    """Forked worker processes, to which the launcher passes on the signals that it receives."""

    def __init__(self, config: Config, num_workers: int) -> None:
        """Fork the workers, which start at once."""
        # One thread per core, over all workers. torch reads this variable when it is imported.
        threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        # gloo would use the address of the hostname, which may not lead to this machine.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        import holdfast.trainer.worker  # noqa: F401 - imported once, for all forked workers

        self._num_workers = num_workers
        self._stop_requested = False
        self._kill_after_s = int(config.checkpoint.stop_deadline_s) + GRACE_S
        self._ranks_by_pid: dict[int, int] = {}
        self._status: int | None = None
        # A pipe with one byte. The first worker that fails reads the byte. Only the worker that has
        # read it may print its error.
        self._report_token, write_end = os.pipe()
        os.write(write_end, b"1")
        os.close(write_end)
        # Bound before the workers get the port, so that no other process can take the port.
        listener = socket.create_server(("127.0.0.1", 0), backlog=2 * num_workers)
        port = listener.getsockname()[1]
        for rank in range(num_workers):
            pid = os.fork()
            if pid == 0:
                self._run_worker(config, rank, listener)
            self._ranks_by_pid[pid] = rank
        self._store = TCPStore(
            "127.0.0.1",
            port,
            num_workers,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        for name in sorted({"SIGINT", "SIGTERM", "SIGHUP", *config.checkpoint.stop_signals}):
            signal.signal(signal.Signals[name], self._pass_on)
        signal.signal(signal.SIGALRM, self._kill)

    def wait(self) -> int:
        """Wait for all workers, and return the exit status of the first that failed, else 0."""
        while self._ranks_by_pid:
            pid, wait_status = os.wait()
            rank = self._ranks_by_pid.pop(pid, None)
            status = os.waitstatus_to_exitcode(wait_status)
            if rank is None or status == 0 or self._status is not None:
                continue
            self._status = status if status > 0 else 128 - status
            worker = f"rank {rank} of {self._num_workers}"
            if 0 < status < 128 and self._is_first_error():
                sys.stderr.write(f"error: {worker} ended with status {status} without a message\n")
            if self._stop_requested:
                continue  # All workers have received the signal, and some are still saving.
            if status < 0:
                name = signal.Signals(-status).name
                sys.stderr.write(
                    f"error: {worker} was killed by {name}\n"
                    "hint: ./run_train.sh resumes from the newest checkpoint"
                    + ("; was the machine out of memory?\n" if name == "SIGKILL" else "\n")
                )
            self._send(signal.SIGTERM)
            signal.alarm(GRACE_S)
        signal.alarm(0)
        return self._status or 0

    def _run_worker(self, config: Config, rank: int, listener: socket.socket) -> None:
        """Run worker `rank` in this forked process, then exit; never returns."""
        status = 1
        try:
            # Leave the terminal's process group, so that ^C does not come twice: the launcher
            # passes it on.
            os.setpgid(0, 0)
            # A shell starts background jobs with SIGINT ignored. Python would go on ignoring it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            port = listener.getsockname()[1]
            listener.close()
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._num_workers),
                "LOCAL_WORLD_SIZE": str(self._num_workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                # The launcher serves the store of torch.distributed, so that it outlives rank 0.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            from holdfast.trainer.worker import work

            status = work(config, self._is_first_error)
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001 - this process ends here: no caller could report it
            if self._is_first_error():
                sys.stderr.write(f"rank {rank} failed:\n{traceback.format_exc()}")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # Not `sys.exit`, which would run the launcher's clean-up in the worker.
            os._exit(status)

    def _is_first_error(self) -> bool:
        """Return True for the first call in any process of the run, False for all later calls."""
        return os.read(self._report_token, 1) == b"1"

    def _pass_on(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stop_requested = True
        self._send(signal.Signals(number))
        signal.alarm(self._kill_after_s)

    def _kill(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        # The launcher has not yet waited for these processes, so the system cannot have given their
        # pids to others.
        for pid in self._ranks_by_pid:
            os.kill(pid, number)


def _num_workers(config: Config) -> int:
    """Return `NGPU`; if unset, the number of usable GPUs; without GPUs, `NUM_CPU_WORKERS`.

    Prints a line if the settings leave GPUs unused.
    """
    text = os.environ.get("NGPU", "").strip()
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(
                f"`NGPU` in the environment must be a number of workers, found: {text!r}",
                hint="NGPU=2; unset, it is the number of GPUs",
            )
        config.check(int(text))
        return int(text)
    num_gpus = count_gpus()
    for count in range(num_gpus, 0, -1):
        with suppress(UsageError):
            config.check(count)
            if count < num_gpus:
                sys.stderr.write(
                    f"using {count} of {num_gpus} GPUs: the settings do not fit all of them; "
                    f"NGPU={num_gpus} shows why\n"
                )
            return count
    count = num_gpus or NUM_CPU_WORKERS
    config.check(count)  # Raises an error if the settings do not fit.
    return count


def count_gpus() -> int:
    """Count the GPUs that torch can use on this machine.

    A child process counts them: after CUDA is initialized, forked workers could not use it.
    """
    if not any(map(os.path.exists, GPU_DEVICES)):
        return 0  # No driver, so no GPU: this saves the import of torch.
    from holdfast import accelerator

    pid = os.fork()
    if pid == 0:
        try:
            os._exit(min(accelerator.num_devices(), 255))
        finally:
            os._exit(0)
    _, wait_status = os.waitpid(pid, 0)
    return max(os.waitstatus_to_exitcode(wait_status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
