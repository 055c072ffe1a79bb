"""Imports torch and Holdfast once, and forks a process for each command of `warm_client.py`."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PRELOADED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "holdfast",
    "holdfast.trainer.worker",
    "holdfast.trainer.launch",
    "holdfast.cli.main",
)
"""Modules that commands find imported."""


@dataclass(frozen=True, slots=True)
class Command:
    """A Python command line to run."""

    arguments: list[str]
    """Arguments of `python`."""

    cwd: str
    """Working directory."""

    environment: dict[str, str]
    """Environment variables."""

    def can_be_forked(self) -> bool:
        """Return True if a fresh interpreter would start with the settings of this one."""
        words = self._words()
        known = bool(words) and (words[0] in ("-c", "-m") or not words[0].startswith("-"))
        return known and _settings(self.environment) == _settings(dict(os.environ))

    def _words(self) -> list[str]:
        """Return the arguments without options that a forked process can obey."""
        if self.arguments[:2] == ["-W", "error"]:
            return self.arguments[2:]
        return self.arguments[1:] if self.arguments[:1] == ["-u"] else self.arguments

    def run(self, client: str) -> None:
        """Run to the end in this process."""
        os.chdir(self.cwd)
        os.environ.clear()
        os.environ.update(self.environment)
        # torchrun and accelerate start their workers with it.
        sys.executable = client
        if self.arguments[:2] != ["-W", "error"]:
            # The server was started with `-W error`, so that a warning of an import is one.
            warnings.filters.remove(("error", None, Warning, None, 0))  # type: ignore[attr-defined]
            sys.warnoptions.clear()
        words = self._words()
        _open_streams(unbuffered=self.arguments[0] == "-u")
        status = 0
        try:
            _run(words)
        except SystemExit as ended:
            status = _status_of(ended)
        except BaseException as error:  # noqa: BLE001 - reported as `python` does
            traceback = error.__traceback__
            while traceback and traceback.tb_frame.f_code.co_filename == __file__:
                traceback = traceback.tb_next
            sys.excepthook(type(error), error.with_traceback(traceback), traceback)
            status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        _end(status)


def _status_of(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


def _end(status: int) -> None:
    """End with a status, or by a signal. Leaves out that every object of torch is freed, which
    takes a third of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


def _settings(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that an interpreter reads when it starts."""
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


def _open_streams(*, unbuffered: bool) -> None:
    """Open the standard streams anew: the server's are of other files."""
    lines = 1 if unbuffered or os.isatty(1) else -1
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", lines, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _run(words: list[str]) -> None:
    """Run what `python` with these arguments runs."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], str(Path.cwd())
        # Run as `__main__` even if it was preloaded under its name.
        sys.modules.pop(words[1], None)
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        return
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        code = compile(words[1], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        main.__file__ = words[0]
        code = compile(Path(words[0]).read_bytes(), words[0], "exec")
    exec(code, main.__dict__)


def wait_for_command(listener: socket.socket) -> Command:
    """Fork a process per command. Returns in these processes only."""
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _accept(connection)
        connection.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass


def _accept(connection: socket.socket) -> Command:
    """Fork once more. Returns the command in the process that is to run it; the other waits for
    its end."""
    os.setsid()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as requests:
        command = Command(**json.loads(requests.readline()))
    if not command.can_be_forked():
        connection.sendall(b"0\n")
        os._exit(0)
    pid = os.fork()
    for number, stream in enumerate(streams):
        os.dup2(stream, number) if pid == 0 else os.close(number)
        os.close(stream)
    if pid == 0:
        connection.close()
        return command
    with suppress(OSError):
        connection.sendall(f"{pid}\n".encode())
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([connection.fileno(), ended], [], [])
        if ended not in ready:  # The client was killed, which is to kill the command.
            os.kill(pid, signal.SIGKILL)
        connection.sendall(f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def import_frameworks(names: list[str]) -> None:
    """Import modules, where they are installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)


def end_with_parent() -> None:
    """Let the kernel end this process when the server that forked it ends."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def serve(client: str, listener: socket.socket) -> None:
    """Serve a client."""
    # Forked processes share its memory until one writes there, as a garbage collection does.
    gc.freeze()
    wait_for_command(listener).run(client)


def main() -> None:
    """Serve the first client of the command line. A process forked from this one serves the other,
    whose commands find modules of frameworks imported.

    Each process imports when the first command comes, since no test may need it.
    """
    plain, plain_file, with_frameworks, frameworks_file, *names = sys.argv[1:]
    listeners = [socket.socket(fileno=int(file)) for file in (plain_file, frameworks_file)]
    select.select(listeners, [], [])
    for name in PRELOADED:
        importlib.import_module(name)
    if os.fork() == 0:
        end_with_parent()
        listeners[0].close()
        select.select([listeners[1]], [], [])
        import_frameworks(names)
        serve(with_frameworks, listeners[1])
    listeners[1].close()
    serve(plain, listeners[0])


if __name__ == "__main__":
    main()
