"""The server of `holdfast serve`, which only reads, and answers only GET and HEAD.

Requests name runs by number, so no request can name a path. Answers come from the latest results
of `WatchedFolder`, so no request waits for a disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from holdfast.dashboard.digest import digest, exposition, unhealthy
from holdfast.dashboard.history import WatchedFolder
from holdfast.dashboard.page import body, framed, summary

HEADER_BYTES_MAX = 16 << 10

CONNECTIONS_MAX = 200
"""Maximum number of open connections. A further one closes the connection idle for longest."""

IDLE_S = 30.0
"""Seconds in which a client must send a request and receive its answer, or is dropped."""

SHUTDOWN_S = 3
"""Seconds for finishing answers when the server stops."""

SCRIPT = """\
"use strict";
let known = null;
async function refresh() {
  if (!document.hidden) {
    try {
      const headers = known ? {"If-None-Match": known} : {};
      const answer = await fetch(location.pathname, {headers, cache: "no-store"});
      if (answer.status === 200) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        document.querySelector("main").replaceWith(page.querySelector("main"));
        document.title = page.title;
        known = answer.headers.get("ETag");
      }
      document.body.classList.toggle("lost", answer.status >= 400);
    } catch {
      document.body.classList.add("lost");
    }
  }
  setTimeout(refresh, 2000);
}
setTimeout(refresh, 2000);
"""
"""Script of the pages: requests the page every two seconds, and shows the new one if it changed."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def server_of(
    folders: Sequence[str], names: Collection[str], max_age_s: float | None
) -> uvicorn.Server:
    """Returns a server of these folders. `names`: host names by which requests may address it."""
    runs = [WatchedFolder(folder) for folder in folders]
    config = uvicorn.Config(
        app_of(runs, names, max_age_s),
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


def app_of(
    runs: Sequence[WatchedFolder], names: Collection[str], max_age_s: float | None
) -> ASGIApp:
    """Returns the ASGI application of `server_of`."""
    numbered = {str(number): run for number, run in enumerate(runs)}

    def of_run(
        answer: Callable[[WatchedFolder, datetime], Response],
    ) -> Callable[[Request], Response]:
        def endpoint(request: Request) -> Response:
            run = numbered.get(request.path_params.get("number", "0"))
            if run is None:
                return PlainTextResponse("no such run\n", status_code=404)
            return _unless_cached(request, answer(run, datetime.now(UTC)))

        return endpoint

    def index(request: Request) -> Response:
        return _unless_cached(request, _index(runs))

    def metrics(_: Request) -> Response:
        text, kind = exposition(runs, datetime.now(UTC))
        return Response(text, headers={"Content-Type": kind})

    def healthz(_: Request) -> Response:
        problems = unhealthy(runs, datetime.now(UTC), max_age_s)
        answer = {"healthy": not problems, "problems": problems}
        return _json(answer, status_code=503 if problems else 200)

    def api(_: Request) -> Response:
        now = datetime.now(UTC)
        return _json({"runs": [digest(run, now, full=False) for run in runs]})

    def api_of_run(run: WatchedFolder, now: datetime) -> Response:
        return _json(digest(run, now, full=True))

    routes = [
        Route("/", of_run(_page) if len(runs) == 1 else index),
        Route("/runs/{number}", of_run(_page)),
        Route("/live.js", lambda _: Response(SCRIPT, media_type="text/javascript")),
        Route("/api/runs", api),
        Route("/api/runs/{number}", of_run(api_of_run)),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
    ]
    return Guard(Starlette(routes=routes), {name.lower() for name in names})


def _page(run: WatchedFolder, now: datetime) -> Response:
    history = run.latest.history
    if history is not None:
        return _html(history.where, body(history, now))
    problem = escape(run.latest.problem or "")
    return _html(run.folder, f"<h1>{escape(run.folder)}</h1><p>{problem}</p>")


def _index(runs: Sequence[WatchedFolder]) -> Response:
    cards = []
    for number, run in enumerate(runs):
        latest = run.latest
        text = latest.problem if latest.history is None else summary(latest.history)
        cards.append(
            f'<section class="card"><h2><a href="/runs/{number}">{escape(run.folder)}</a></h2>'
            f"<p>{escape(text or '')}</p></section>"
        )
    return _html("Holdfast", f'<h1>Runs</h1><div class="charts">{"".join(cards)}</div>')


def _json(value: Any, status_code: int = 200) -> Response:
    # `json.dumps` writes ASCII, since file names may be no valid UTF-8.
    return Response(json.dumps(value) + "\n", status_code, media_type="application/json")


def _html(title: str, text: str) -> Response:
    page = framed(escape(title), text, script="/live.js").encode(errors="replace")
    tag = hashlib.sha256(page).hexdigest()[:32]
    return Response(page, media_type="text/html", headers={"ETag": f'"{tag}"'})


def _unless_cached(request: Request, answer: Response) -> Response:
    """Returns the answer; status 304 where the client has it already."""
    tag = answer.headers.get("ETag")
    if tag is not None and request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return answer


class Guard:
    """Middleware that refuses requests for other host names and methods, and adds `HEADERS`.

    Against DNS rebinding: a web page elsewhere could let its own host name resolve to this machine,
    and then read these answers.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        app = self._app
        if not is_own(host, self._names):
            text = f"not a name of this server: {host[:200]}\n--allow-host NAME admits one\n"
            app = PlainTextResponse(text, status_code=421)
        elif scope["method"] not in ("GET", "HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            app = PlainTextResponse("this server only reads\n", status_code=405, headers=allowed)
        await app(scope, receive, guarded)


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether the `Host` of a request is one of these names, or an address.

    An address is safe, since no web page can let it resolve to another machine.

    >>> [is_own(host, {"localhost"}) for host in ("127.0.0.1:8420", "[::1]", "evil.example")]
    [True, True, False]
    """
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdecimal() or (":" in name and not name.endswith("]")):
        name = host
    name = name.removeprefix("[").removesuffix("]").lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


class TimedProtocol(H11Protocol):
    """An HTTP connection that is dropped after `IDLE_S` without a completed answer.

    Without the limit, clients that send half a request or receive no answer use up all connections.
    """

    since = 0.0
    """Time of the latest answer, or of the connection, by the clock of the event loop."""

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
