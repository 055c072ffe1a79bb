"""Python commands without the seconds that importing torch takes: a server imports it once, and
forks a process for each command."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COLD = "HOLDFAST_TESTS_COLD"
"""Environment variable with which every command starts afresh."""

SHARED = "HOLDFAST_TESTS_PYTHON"
"""Environment variables with the paths that `python` returned in the process that started this one:
this one, and the one that ends in `_FRAMEWORKS`. Workers of one test run share the server, which
takes seconds to start."""

FRAMEWORKS = (
    "transformers",
    "transformers.trainer",
    "peft",
    "trl",
    "trl.trainer.sft_trainer",
    "accelerate.commands.accelerate_cli",
    "pytorch_lightning",
)
"""Modules that commands with `frameworks` find imported, where they are installed."""


def share() -> None:
    """Start the server for this process and those that it starts."""
    os.environ[_shared(frameworks=False)] = python()
    os.environ[_shared(frameworks=True)] = python(frameworks=True)


def _shared(*, frameworks: bool) -> str:
    return f"{SHARED}_FRAMEWORKS" if frameworks else SHARED


def python(*, frameworks: bool = False) -> str:
    """Path of a program that runs a command as `python` does.

    Its processes find torch and Holdfast imported, with `frameworks` also those that people train
    with. It starts the real interpreter for options other than `-c`, `-m`, `-u` and `-W error`, and
    for other values of variables `PYTHON...`.
    """
    if os.environ.get(COLD):
        return sys.executable
    if started := os.environ.get(_shared(frameworks=frameworks)):
        return started
    plain, with_frameworks = _start()
    return str(with_frameworks if frameworks else plain)


@cache
def _start() -> tuple[Path, Path]:
    """Start the server. Returns the paths of the two programs that send commands to it."""
    # Paths of sockets are short, those of `tmp_path` may not be.
    home = Path(tempfile.mkdtemp(prefix="warm-"))
    plain, with_frameworks = home / "plain" / "python", home / "frameworks" / "python"
    text = (HERE / "warm_client.py").read_text().replace('"PYTHON"', repr(sys.executable))
    listeners = []
    for client in (plain, with_frameworks):
        client.parent.mkdir()
        client.write_text(f"#!{sys.executable} -IS\n{text}")
        client.chmod(0o755)
        # Listens before the server runs, so that commands wait for it.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(client.parent / "socket"))
        listener.listen(64)
        listeners.append(listener)
    files = [listener.fileno() for listener in listeners]
    served = [str(plain), str(files[0]), str(with_frameworks), str(files[1])]
    server = subprocess.Popen(
        [sys.executable, "-W", "error", str(HERE / "warm_server.py"), *served, *FRAMEWORKS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=files,
    )
    for listener in listeners:
        listener.close()

    def stop() -> None:
        server.terminate()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)

    atexit.register(stop)
    return plain, with_frameworks
