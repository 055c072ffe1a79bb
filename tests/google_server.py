"""A server of Google's XML API on loopback: moto's server of S3, behind a translation.

The XML API is that of S3, except for what Holdfast depends on most: the conditions of a put. Google
has `x-goog-if-generation-match: N`, with 0 for an object that does not exist, and each answer has
the generation of the object. No emulator that package registries have answers this API.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import pytest

from s3_server import App, s3_server

KEY = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}


_SIGNED = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0"
)
"""Authorization that moto takes, which checks no signature."""


class Translation:
    """Answers requests of Google's XML API by a server of S3."""

    def __init__(self) -> None:
        self._generations: dict[str, int] = {}
        """Generation of each object, by path."""

        self._last = 0
        self._mutex = threading.RLock()

    def __call__(self, app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # obstore encodes slashes too, which moto does not undo.
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        environ["RAW_URI"] = environ["REQUEST_URI"] = quote(environ["PATH_INFO"]) + query
        environ["HTTP_AUTHORIZATION"] = _SIGNED
        changes = environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE")
        if not changes or "partNumber" in environ["QUERY_STRING"]:
            return app(environ, self._answers(environ, start_response))
        with self._mutex:
            return self._change(app, environ, start_response)

    def _change(self, app: App, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, wanted = environ["PATH_INFO"], environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        if wanted is not None and int(wanted) != self._generations.get(path, 0):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>PreconditionFailed</Code></Error>"
            start_response("412 Precondition Failed", [("Content-Length", str(len(body)))])
            return [body]
        if environ["REQUEST_METHOD"] == "DELETE":
            if self._generations.pop(path, None) is None and not environ["QUERY_STRING"]:
                body = b"<Error><Code>NoSuchKey</Code></Error>"
                start_response("404 Not Found", [("Content-Length", str(len(body)))])
                return [body]
        elif environ["QUERY_STRING"] != "uploads" and environ["QUERY_STRING"] != "uploads=":
            self._last += 1
            self._generations[path] = self._last
        return [*app(environ, self._answers(environ, start_response))]

    def _answers(self, environ: dict[str, Any], start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            generation = self._generations.get(environ["PATH_INFO"])
            if generation is not None:
                headers = [*headers, ("x-goog-generation", str(generation))]
            return start_response(status, headers, *more)

        return start


_TRANSLATION = Translation()


def new_google_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a new bucket, which the environment leads to."""
    server = s3_server()
    monkeypatch.setattr(server, "_around", _TRANSLATION)
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
    # Without a key, obstore would ask the machine for one.
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(KEY))
    return f"gs://{server.new_bucket()}"
