"""Web server of `holdfast serve`. It only reads, and answers only GET and HEAD.

Requests name runs by number, so no request can name a path. Answers come from the latest results
of `WatchedFolder`, so no request waits for a disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from holdfast.dashboard.access import Guard
from holdfast.dashboard.condition import Limits
from holdfast.dashboard.digest import digest, exposition, unhealthy
from holdfast.dashboard.page import body, framed
from holdfast.dashboard.runs_page import STYLE, runs_page
from holdfast.dashboard.watch import Fleet, WatchedFolder

HEADER_BYTES_MAX = 16 << 10

CONNECTIONS_MAX = 200
"""Maximum number of open connections. One more closes the connection that is idle for longest."""

IDLE_S = 30.0
"""Seconds without a completed answer after which a connection is dropped."""

SHUTDOWN_S = 3
"""Seconds for which a server that stops continues to send answers."""

PAGE_S = 1.0
"""Seconds for which all clients get the same copy of the page about all runs."""

NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
"""Pattern for the number of a run in the path of a URL."""

LINK_TO_RUNS = '<nav><a href="/runs">All runs</a></nav>'

SCRIPTS = {name: files(__package__).joinpath(name).read_bytes() for name in ("live.js", "runs.js")}
"""Scripts of the pages, by name."""


def server_of(
    fleet: Fleet, names: Collection[str], limits: Limits, token: str | None
) -> uvicorn.Server:
    """Return a server that shows the runs of a fleet.

    `names`: host names by which requests may address the server. `token`: token that requests must
    have; None if they need no token.
    """
    config = uvicorn.Config(
        app_of(fleet, names, limits, token),
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def app_of(fleet: Fleet, names: Collection[str], limits: Limits, token: str | None) -> ASGIApp:
    """Return the ASGI application that `server_of` serves. The parameters are the same."""
    table = _Table(fleet, limits)

    def of_run(
        answer: Callable[[WatchedFolder, datetime], Response],
    ) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            number = str(request.path_params["number"])
            run = fleet.runs.get(int(number)) if NUMBER.fullmatch(number) else None
            if run is None:
                return PlainTextResponse("no such run\n", status_code=404)
            return _unless_cached(request, answer(run, datetime.now(UTC)))

        return endpoint

    def start(request: Request) -> Response:
        run = fleet.runs.get(0) if fleet.is_single else None
        answer = table.page() if run is None else _page(run, datetime.now(UTC))
        return _unless_cached(request, answer)

    def runs(request: Request) -> Response:
        return _unless_cached(request, table.page())

    def metrics(_: Request) -> Response:
        text, kind = exposition([*fleet.runs.values()], datetime.now(UTC), limits)
        return Response(text, headers={"Content-Type": kind})

    def healthz(_: Request) -> Response:
        problems = unhealthy([*fleet.runs.values()], datetime.now(UTC), limits.max_age_s)
        answer = {"healthy": not problems, "problems": problems}
        return _json(answer, status_code=503 if problems else 200)

    def api(_: Request) -> Response:
        now, known = datetime.now(UTC), fleet.runs.items()
        digests = [{"number": n} | digest(run, now, limits, full=False) for n, run in known]
        return _json({"runs": digests})

    def api_of_run(run: WatchedFolder, now: datetime) -> Response:
        return _json(digest(run, now, limits, full=True))

    def script(request: Request) -> Response:
        return Response(SCRIPTS[request.url.path[1:]], media_type="text/javascript")

    scripts = [Route(f"/{name}", script) for name in SCRIPTS]
    routes = [
        Route("/", start),
        Route("/runs", runs),
        Route("/runs/{number}", of_run(_page)),
        *scripts,
        Route("/api/runs", api),
        Route("/api/runs/{number}", of_run(api_of_run)),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
    ]
    return Guard(Starlette(routes=routes), {name.lower() for name in names}, token)


class _Table:
    """Page about all runs, which is made at most once in `PAGE_S` seconds."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        self._fleet, self._limits = fleet, limits
        self._lock = threading.Lock()
        self._made_at, self._made = -math.inf, b""

    def page(self) -> Response:
        # Requests run in threads. Without the lock, each of them would make the page.
        with self._lock:
            if time.monotonic() - self._made_at > PAGE_S:
                now, incomplete = datetime.now(UTC), self._fleet.incomplete
                title, content = runs_page(
                    self._fleet.runs, now, self._limits, incomplete=incomplete
                )
                self._made = _bytes(title, content, script="/runs.js", style=STYLE)
                self._made_at = time.monotonic()
            return _html(self._made)


def _page(run: WatchedFolder, now: datetime) -> Response:
    history = run.latest.history
    if history is not None:
        return _html(_bytes(history.where, LINK_TO_RUNS + body(history, now), script="/live.js"))
    problem = escape(run.latest.problem or "")
    text = f"{LINK_TO_RUNS}<h1>{escape(run.folder)}</h1><p>{problem}</p>"
    return _html(_bytes(run.folder, text, script="/live.js"))


def _json(value: Any, status_code: int = 200) -> Response:
    # File names may contain bytes that are not UTF-8. `json.dumps` escapes them.
    return Response(json.dumps(value) + "\n", status_code, media_type="application/json")


def _bytes(title: str, text: str, *, script: str, style: str = "") -> bytes:
    return framed(escape(title), text, script=script, style=style).encode(errors="replace")


def _html(page: bytes) -> Response:
    tag = hashlib.sha256(page).hexdigest()[:32]
    return Response(page, media_type="text/html", headers={"ETag": f'"{tag}"'})


def _unless_cached(request: Request, answer: Response) -> Response:
    """Return the answer, or one with status 304 if the client already has the content."""
    tag = answer.headers.get("ETag")
    if tag is not None and request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return answer


class TimedProtocol(H11Protocol):
    """HTTP connection that is dropped after `IDLE_S` seconds without a completed answer.

    Otherwise, clients that send half a request or read no answer could use up all connections.
    """

    since: float = 0.0
    """Event-loop time of the latest answer; before the first, of the start of the connection."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_timer()
        if len(self.connections) > CONNECTIONS_MAX:
            timed = (one for one in self.connections if isinstance(one, TimedProtocol))
            min(timed, key=lambda connection: connection.since).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_timer()

    def drop(self) -> None:
        """Close the connection at once."""
        self.transport.abort()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.since = self.loop.time()
        self._timer = self.loop.call_later(IDLE_S, self.drop)
