"""`holdfast serve`: serve live web pages about runs, metrics for Prometheus and a health check."""

from __future__ import annotations

import ipaddress
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

import tyro

from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_parent
from holdfast.cli.terminal import POSITIONAL, Options, parsed, say, say_error
from holdfast.errors import ExistsError, StorageError, UsageError
from holdfast.skills.startup import refresh
from holdfast.spelling import counted
from holdfast.storage.local import LocalStore
from holdfast.storage.objects import ObjectStore

PACKAGES = ("prometheus_client", "starlette", "uvicorn")
"""Packages of the extra `serve`."""

TOKEN = "HOLDFAST_SERVE_TOKEN"
"""Environment variable with the token that requests must have."""

TOKEN_LENGTH_MIN = 16


@dataclass(frozen=True, slots=True)
class ServeArguments(Options):
    """Serve a live table of runs, a page for each of them, /metrics for Prometheus, /healthz and
    JSON. The server only reads. Only this machine can reach it, unless --host says otherwise: then
    it asks for a token. Needs: pip install 'holdfast[serve]'.

    Example: holdfast serve outputs other/outputs --max-age 3600
    """

    folders: tuple[str, ...] = field(metadata=POSITIONAL)
    """Paths or URLs of folders of checkpoints, or of folders above them. One that does not exist
    yet is shown once it does."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine, the server asks for a token: the one in the
    environment variable HOLDFAST_SERVE_TOKEN, or one that it generates and prints."""

    open: bool = False
    """Ask for no token: everyone who can reach the address can read."""

    port: int = 8420
    """Port to listen on; 0 for any free port."""

    max_age: float | None = None
    """Age in seconds of the newest good checkpoint above which /healthz answers 503, and the run is
    shown as stale."""

    stale_intervals: float = 3.0
    """Age above which a run is shown as stale, as a number of its own save intervals."""

    allow_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another name by which browsers may address this server. May be repeated."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast serve`: serve until SIGINT or SIGTERM. Return the exit status."""
    options = parsed(ServeArguments, "serve", arguments)
    check(options)
    token = token_of(options, os.environ)
    try:
        from holdfast.dashboard.condition import Limits
        from holdfast.dashboard.watch import Fleet
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
    limits = Limits(options.stale_intervals, options.max_age)
    fleet = Fleet(options.folders)
    server = server_of(fleet, names, limits, token)
    received: list[signal.Signals] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        # The server replaces these handlers while it runs. It restores them as it stops, and then
        # raises the signal again, so that `stop` records it.
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    say(f"serving {counted(len(options.folders), 'folder')} at http://{_in_url(host)}:{port}")
    if token is not None and TOKEN not in os.environ:
        name = socket.gethostname() if host in ("0.0.0.0", "::") else _in_url(host)
        say(f"open it with its token: http://{name}:{port}/?token={token}")
    sys.stdout.flush()
    server.run(sockets=[listener])
    fleet.stop()
    by = received[0].name if received else "itself"
    say(f"stopped by {by}: {counted(server.server_state.total_requests, 'request')} answered")
    return 0


def token_of(options: ServeArguments, environment: Mapping[str, str]) -> str | None:
    """Return the token that requests must have; None if they need no token.

    If the environment has no token, generate one for an address that other machines can reach,
    unless `--open` is given.

    Raises:
        UsageError: the token in the environment is too short, or contradicts `--open`.
    """
    given = environment.get(TOKEN)
    if given is not None:
        if options.open:
            raise UsageError(
                f"`--open` asks for no token, but `{TOKEN}` is set", hint=f"unset {TOKEN}"
            )
        if len(given) < TOKEN_LENGTH_MIN:
            raise UsageError(
                f"the token in `{TOKEN}` has {counted(len(given), 'character')}, it must have at "
                f"least {TOKEN_LENGTH_MIN}",
                hint="openssl rand -hex 24",
            )
        return given
    return None if options.open or is_loopback(options.host) else secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "node-1")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check(options: ServeArguments) -> None:
    """Check the folders and numbers in the options.

    Raises:
        UsageError: there is no folder, a URL cannot be watched, or a number is out of range.
    """
    if not options.folders:
        raise UsageError(
            "`holdfast serve` needs a folder", hint="holdfast serve outputs/checkpoint"
        )
    for folder in options.folders:
        store, name = open_parent(folder)
        if isinstance(store, LocalStore):
            check_folder(store, name)
        elif not isinstance(store, ObjectStore):
            raise UsageError(
                f"`{folder}` is a URL that `holdfast serve` cannot watch: it watches folders and "
                "buckets",
                hint=f"holdfast report {folder}",
            )
    if not 0 <= options.port < 1 << 16:
        raise UsageError(f"`--port` must be 0 to 65535, found: {options.port}")
    if options.max_age is not None and not options.max_age > 0:
        raise UsageError(
            f"`--max-age` must be a positive number of seconds, found: {options.max_age}"
        )
    if not options.stale_intervals > 0:
        raise UsageError(
            f"`--stale-intervals` must be a positive number, found: {options.stale_intervals}"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address."""
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
