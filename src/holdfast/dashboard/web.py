"""The server behind `holdfast serve`. Reads, and answers nothing but GET and HEAD.

Requests name runs by number, so no request can name a path; what is answered was found by threads
that look at the folders (`watched`), so no request waits for a disk.
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

from holdfast.dashboard.digest import digest, exposition, health
from holdfast.dashboard.page import body, framed, summary
from holdfast.dashboard.watched import Watched

HEADER_BYTES_MAX = 16 << 10

CONNECTIONS_MAX = 200
"""Beyond these, the one that has waited the longest makes way."""

PATIENCE_S = 30.0
"""Within which a request must have come, and its answer be taken."""

GRACE_S = 3
"""For what is being answered when the server is to end."""

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
"""Asks for the page again and again, and shows the new one where it has changed."""

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
    """A server of these folders, for requests that call it by one of these names."""
    runs = [Watched(folder) for folder in folders]
    config = uvicorn.Config(
        app_of(runs, names, max_age_s),
        http=Patient,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES_MAX,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def app_of(runs: Sequence[Watched], names: Collection[str], max_age_s: float | None) -> ASGIApp:
    """The server as an ASGI application, for requests that call it by one of these names."""

    numbered = {str(number): run for number, run in enumerate(runs)}

    def of_run(answer: Callable[[Watched, datetime], Response]) -> Callable[[Request], Response]:
        def found(request: Request) -> Response:
            run = numbered.get(request.path_params.get("number", "0"))
            if run is None:
                return PlainTextResponse("no such run\n", status_code=404)
            return _unless_known(request, answer(run, datetime.now(UTC)))

        return found

    def index(request: Request) -> Response:
        if len(runs) == 1:
            return of_run(_page)(request)
        return _unless_known(request, _index(runs))

    def metrics(_: Request) -> Response:
        text, kind = exposition(runs, datetime.now(UTC))
        return Response(text, headers={"Content-Type": kind})

    def healthz(_: Request) -> Response:
        healthy, said = health(runs, datetime.now(UTC), max_age_s)
        return _json(said, status_code=200 if healthy else 503)

    def api(_: Request) -> Response:
        now = datetime.now(UTC)
        return _json({"runs": [digest(run, now, whole=False) for run in runs]})

    def api_of_run(run: Watched, now: datetime) -> Response:
        return _json(digest(run, now, whole=True))

    routes = [
        Route("/", index),
        Route("/runs/{number}", of_run(_page)),
        Route("/live.js", lambda _: Response(SCRIPT, media_type="text/javascript")),
        Route("/api/runs", api),
        Route("/api/runs/{number}", of_run(api_of_run)),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
    ]
    return Guard(Starlette(routes=routes), {name.lower() for name in names})


def _page(run: Watched, now: datetime) -> Response:
    seen = run.seen
    if seen.history is not None:
        return _html(seen.history.where, body(seen.history, now))
    said = f"<h1>{escape(run.folder)}</h1><p>{escape(seen.problem or '')}</p>"
    return _html(run.folder, said)


def _index(runs: Sequence[Watched]) -> Response:
    cards = []
    for number, run in enumerate(runs):
        seen = run.seen
        said = seen.problem if seen.history is None else summary(seen.history)
        cards.append(
            f'<section class="card"><h2><a href="/runs/{number}">{escape(run.folder)}</a></h2>'
            f"<p>{escape(said or '')}</p></section>"
        )
    return _html("Holdfast", f'<h1>Runs</h1><div class="charts">{"".join(cards)}</div>')


def _json(value: Any, status_code: int = 200) -> Response:
    # In ASCII: names of files may be no text in any encoding.
    return Response(json.dumps(value) + "\n", status_code, media_type="application/json")


def _html(title: str, text: str) -> Response:
    page = framed(escape(title), text, script="/live.js").encode(errors="replace")
    tag = hashlib.sha256(page).hexdigest()[:32]
    return Response(page, media_type="text/html", headers={"ETag": f'"{tag}"'})


def _unless_known(request: Request, answer: Response) -> Response:
    """The answer, or that the client has it."""
    tag = answer.headers.get("ETag")
    if tag is not None and request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return answer


class Guard:
    """Refuses what is no reading request, or calls the server by a name that is not its own: a page
    elsewhere could have had its own name resolve to this machine. Adds the headers that keep
    browsers from more than is meant."""

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
            said = f"not a name of this server: {host[:200]}\n--allow-host NAME admits one\n"
            app = PlainTextResponse(said, status_code=421)
        elif scope["method"] not in ("GET", "HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            app = PlainTextResponse("this server is only read\n", status_code=405, headers=allowed)
        await app(scope, receive, guarded)


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether a request is meant for this server: by an address, which nobody can have resolve to
    another, or one of these names.

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


class Patient(H11Protocol):
    """A connection that is dropped where nothing is answered for long: because the request does not
    come to its end, or the client does not take the answer."""

    since = 0.0
    """When it was opened, or last answered."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > CONNECTIONS_MAX:
            others = (one for one in self.connections if isinstance(one, Patient))
            min(others, key=lambda one: one.since).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def drop(self) -> None:
        """Close it at once."""
        self.transport.abort()

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.since = self.loop.time()
        self._timer = self.loop.call_later(PATIENCE_S, self.drop)
