"""`holdfast serve`: runs and their checkpoints as live pages, metrics and a health check."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import tyro

from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import place_of
from holdfast.cli.terminal import parsed, say, say_error
from holdfast.errors import ExistsError, StorageError, UsageError
from holdfast.skills.startup import refresh
from holdfast.spelling import counted

PACKAGES = ("prometheus_client", "starlette", "uvicorn")
"""Of the extra `serve`."""


@dataclass(frozen=True, slots=True)
class ServeArguments:
    """Serve runs as live web pages, /metrics for Prometheus, /healthz and JSON. It only reads, and
    listens on this machine alone unless told otherwise. Needs: pip install 'holdfast[serve]'.

    Example: holdfast serve outputs/checkpoint --max-age 3600
    """

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folders of steps; one that is not there yet is shown once it is."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no login: whoever reaches it can read."""

    port: int = 8420
    """Port to listen on; 0 takes any that is free."""

    max_age: float | None = None
    """Seconds; where the newest good step is older, /healthz answers 503."""

    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A further name that browsers may call this server by."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    asked = parsed(ServeArguments, "serve", arguments)
    check(asked)
    try:
        from holdfast.dashboard.web import server_of
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise UsageError(
            f"`holdfast serve` needs the package `{error.name}`, which is not installed",
            hint="pip install 'holdfast[serve]'",
        ) from error
    for line in refresh(os.environ):
        say_error(line)
    listener = listen(asked.host, asked.port)
    names = ["localhost", asked.host, socket.gethostname(), *asked.allow_host]
    server = server_of(asked.folders, names, asked.max_age)
    came: list[signal.Signals] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(signal.Signals(number))
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        # While it runs the server has handlers of its own, which pass on what has ended it.
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    say(f"serving {counted(len(asked.folders), 'folder')} at http://{_in_url(host)}:{port}")
    sys.stdout.flush()
    server.run(sockets=[listener])
    by = came[0].name if came else "itself"
    say(f"stopped by {by}: {counted(server.server_state.total_requests, 'request')} answered")
    return 0


def check(asked: ServeArguments) -> None:
    """Raises:
    UsageError: what is asked for cannot be served.
    """
    if not asked.folders:
        raise UsageError("which folder?", hint="holdfast serve outputs/checkpoint")
    for folder in asked.folders:
        if "://" in folder:
            raise UsageError(
                f"`{folder}` is a URL: a server watches folders of this machine",
                hint=f"holdfast report {folder}",
            )
        check_folder(*place_of(folder))
    if not 0 <= asked.port < 1 << 16:
        raise UsageError(f"`--port` is 0 to 65535, found: {asked.port}")
    if asked.max_age is not None and not asked.max_age > 0:
        raise UsageError(f"`--max-age` is a number of seconds, found: {asked.max_age}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, before anything is said of it.

    Raises:
        ExistsError: somebody listens there already.
        StorageError: it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        what = f"cannot listen on {_in_url(host)}:{port}: {error.strerror or error}"
        if port and "in use" in what:
            raise ExistsError(what, hint="--port 0 takes a port that is free") from error
        raise StorageError(what, hint="--host 127.0.0.1, or an address of this machine") from error


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
