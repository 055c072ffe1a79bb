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
"""Environment variable with the path that `python` returned in the process that started this one.
Workers of one test run share its server, since each server takes seconds to start."""


@cache
def python() -> str:
    """Path of a program that runs a command as `python` does.

    Its processes find torch and Holdfast imported. It starts the real interpreter for options other
    than `-c`, `-m`, `-u` and `-W error`, and for other values of variables `PYTHON...`.
    """
    if os.environ.get(COLD):
        return sys.executable
    if started := os.environ.get(SHARED):
        return started
    # Paths of sockets are short, those of `tmp_path` may not be.
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    client = folder / "python"
    text = (HERE / "warm_client.py").read_text().replace('"PYTHON"', repr(sys.executable))
    client.write_text(f"#!{sys.executable} -IS\n{text}")
    client.chmod(0o755)
    # Listens before the server runs, so that commands wait for it.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    server = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            str(HERE / "warm_server.py"),
            str(listener.fileno()),
            str(client),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
    )
    listener.close()

    def stop() -> None:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return str(client)
