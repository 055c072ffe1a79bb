"""Faults of an HTTP server at chosen requests: errors, lost answers, cut connections, time-outs.

fault = Fault("503", at=3)
with s3_server().handled(fault):
    ...
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from s3_server import App

Mode = Literal["500", "503", "refused", "late", "lost", "cut", "half"]
"""Fault at a request.

* `500`, `503`: it has no effect, and the answer is that error, `503` with the code `SlowDown`;
* `refused`: it has no effect, and the connection is closed;
* `late`: it has no effect, and is answered with 500 after the client's time-out;
* `lost`: it has its effect, and the answer is 500;
* `cut`: it has its effect, and the connection is closed without an answer;
* `half`: it has its effect, and the connection is closed after half of the answer's body.
"""

MODES: tuple[Mode, ...] = get_args(Mode)

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"


@dataclass
class Fault:
    """Disturbs requests from number `at` on, of those with these methods."""

    mode: Mode
    at: int
    times: int = 1
    """Requests that are disturbed."""

    methods: tuple[str, ...] = ("GET", "PUT", "POST", "DELETE", "HEAD")
    late_s: float = 3.5
    """Time until a late answer."""

    count: int = 0
    disturbed: list[str] = field(default_factory=list)
    """The requests that were disturbed."""

    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._mutex:
            is_chosen = False
            if environ["REQUEST_METHOD"] in self.methods:
                is_chosen = self.at <= self.count < self.at + self.times
                self.count += 1
            if is_chosen:
                self.disturbed.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if not is_chosen:
            return app(environ, start_response)
        return self._disturb(app, environ, start_response)

    def _disturb(self, app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.mode in ("500", "503", "refused", "late"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if self.mode == "late":
            time.sleep(self.late_s)
        if self.mode in ("500", "late"):
            return _error(start_response, "500 Internal Server Error", b"")
        if self.mode == "503":
            return _error(start_response, "503 Service Unavailable", SLOW_DOWN)
        if self.mode == "refused":
            return _hang_up(environ)
        given: list[Any] = []
        body = b"".join(app(environ, lambda *answer: given.extend(answer)))
        if self.mode == "lost":
            return _error(start_response, "500 Internal Server Error", b"")
        if self.mode == "half" and len(body) > 1:
            start_response(given[0], given[1])
            return _half(environ, body)
        return _hang_up(environ)

    def __str__(self) -> str:
        return f"{self.mode}, request {self.at}: {', '.join(self.disturbed)}"


def _error(start_response: Any, status: str, body: bytes) -> Iterable[bytes]:
    start_response(status, [("Content-Length", str(len(body)))])
    return [body]


def _hang_up(environ: dict[str, Any]) -> Iterable[bytes]:
    with suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return []


def _half(environ: dict[str, Any], body: bytes) -> Iterable[bytes]:
    yield body[: len(body) // 2]
    _hang_up(environ)
