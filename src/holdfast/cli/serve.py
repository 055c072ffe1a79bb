"""`holdfast serve`: runs and their checkpoints as live web pages, metrics and a health check."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

import tyro

from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_parent
from holdfast.cli.terminal import POSITIONAL, Options, parsed, say, say_error
from holdfast.errors import ExistsError, StorageError, UsageError
from holdfast.skills.startup import refresh
from holdfast.spelling import counted

PACKAGES = ("prometheus_client", "starlette", "uvicorn")
"""Packages of the extra `serve`."""


@dataclass(frozen=True, slots=True)
class ServeArguments(Options):
    """Serve runs as live web pages, /metrics for Prometheus, /healthz and JSON. The server only
    reads, and only this machine can reach it unless --host says otherwise. Needs: pip install
    'holdfast[serve]'.

    Example: holdfast serve outputs/checkpoint --max-age 3600
    """

    folders: tuple[str, ...] = field(metadata=POSITIONAL)
    """Folders of checkpoints. One that does not exist yet is shown once it does."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no login: everyone who can reach it can read."""

    port: int = 8420
    """Port to listen on; 0 for any free port."""

    max_age: float | None = None
    """Age in seconds of the newest good checkpoint above which /healthz answers 503."""

    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another name by which browsers may address this server. May be repeated."""


def run(arguments: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    options = parsed(ServeArguments, "serve", arguments)
    check(options)
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
    listener = listen(options.host, options.port)
    names = ["localhost", options.host, socket.gethostname(), *options.allow_host]
    server = server_of(options.folders, names, options.max_age)
    received: list[signal.Signals] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        # The server's own handlers replace these while it runs, and raise the signal at the end.
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    say(f"serving {counted(len(options.folders), 'folder')} at http://{_in_url(host)}:{port}")
    sys.stdout.flush()
    server.run(sockets=[listener])
    by = received[0].name if received else "itself"
    say(f"stopped by {by}: {counted(server.server_state.total_requests, 'request')} answered")
    return 0


def check(options: ServeArguments) -> None:
    """Raise a UsageError where the options leave nothing to serve."""
    if not options.folders:
        raise UsageError(
            "`holdfast serve` needs a folder", hint="holdfast serve outputs/checkpoint"
        )
    for folder in options.folders:
        if "://" in folder:
            raise UsageError(
                f"`{folder}` is a URL: `holdfast serve` watches folders of this machine",
                hint=f"holdfast report {folder}",
            )
        check_folder(*open_parent(folder))
    if not 0 <= options.port < 1 << 16:
        raise UsageError(f"`--port` must be 0 to 65535, found: {options.port}")
    if options.max_age is not None and not options.max_age > 0:
        raise UsageError(
            f"`--max-age` must be a positive number of seconds, found: {options.max_age}"
        )


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        what = f"cannot listen on {_in_url(host)}:{port}: {error.strerror or error}"
        if port and "in use" in what:
            raise ExistsError(what, hint="--port 0 takes any free port") from error
        raise StorageError(what, hint="--host 127.0.0.1, or an address of this machine") from error


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
