"""Runs a Python command in a process forked from the server of `warm.py`, in place of `python`.

`warm.py` copies this file beside the server's socket. Exit status, signals, standard streams,
working directory and environment are those of a process that starts afresh.
"""

# pathlib would take longer to import than all else here.
# ruff: noqa: PTH100, PTH109, PTH118, PTH120

import json
import os
import signal
import socket
import sys

REAL = "PYTHON"  # replaced by the path of the interpreter
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    arguments = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
        socket.send_fds(server, [b"+"], [0, 1, 2])
        request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
        server.sendall(json.dumps(request).encode() + b"\n")
        with server.makefile() as replies:
            pid = int(replies.readline())
            if pid == 0:  # A command that a forked process would run differently.
                os.execv(REAL, [REAL, *arguments])
            for number in FORWARDED:
                signal.signal(number, lambda number, _: os.kill(pid, number))
            status = os.waitstatus_to_exitcode(int(replies.readline()))
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
