"""A real server of S3 on loopback: moto's, in a thread of the test process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread
from typing import Any
from urllib.request import Request, urlopen

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

Answer = Callable[[dict[str, Any]], tuple[str, bytes] | None]
"""Gives the status line and the body of the answer to a request, or None for that of the server."""


App = Callable[[dict[str, Any], Any], Iterable[bytes]]
"""A WSGI application."""

Around = Callable[[App, dict[str, Any], Any], Iterable[bytes]]
"""Answers a request, for example by the application that it is given."""


class S3Server:
    """One server, which is shared by all tests of the process."""

    def __init__(self) -> None:
        # Imported here, since each process of the tests imports this module.
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._around: Around = _plainly
        server = make_server("127.0.0.1", 0, self._serve, threaded=True)
        self.url = f"http://127.0.0.1:{server.server_port}"
        self._num_buckets = 0
        Thread(target=server.serve_forever, name="s3", daemon=True).start()

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        return self._around(self._app, environ, start_response)

    def new_bucket(self, name: str = "") -> str:
        """Make a bucket. Returns its name, which is new by default."""
        self._num_buckets += 1
        name = name or f"bucket-{self._num_buckets}"
        with urlopen(Request(f"{self.url}/{name}", method="PUT")):
            return name

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which every client finds the server."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1"}

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Answer requests by `answer` instead."""

        def answered(app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            found = answer(environ)
            if found is None:
                return app(environ, start_response)
            status, body = found
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(status, [("Content-Length", str(len(body)))])
            return [body]

        with self.handled(answered):
            yield

    @contextmanager
    def handled(self, around: Around) -> Iterator[None]:
        """Answer requests by `around`, which is given the server's application."""
        self._around = around
        try:
            yield
        finally:
            self._around = _plainly


def _plainly(app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    return app(environ, start_response)


@cache
def s3_server() -> S3Server:
    """Return the server of this process."""
    return S3Server()


def new_s3_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a new bucket of the server, which the environment leads to."""
    server = s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.new_bucket()}"
