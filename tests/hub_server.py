"""A small Hugging Face hub on loopback: repositories with commits, and storage of large files.

Speaks the part of the hub's protocol by which `huggingface_hub` creates a repository, lists it and
uploads a folder without Xet. Files of the two suffixes in `LARGE` go through the storage of large
files, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".bin")
TOKEN = "hf_writes"
READ_ONLY = "hf_reads"


@dataclass
class Hub:
    """Contents of the hub, and what was asked of it."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Whether each repository is private."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Contents of the newest commit of each repository."""

    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files, by their SHA-256."""

    num_sent: int = 0
    """Number of large files that were sent."""

    fails_after: int | None = None
    """Number of large files after which the hub fails; None: never."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a large file is stored."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", self.path.partition("?")[0]):
            files = self.hub.files.get(match[1])
            if files is None:
                return self._answer(404, {"error": "Repository not found"})
            if (match[2] or "").startswith("/tree/"):
                return self._answer(
                    200,
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in files.items()
                    ],
                )
            siblings = [{"rfilename": name} for name in files]
            return self._answer(200, {"id": match[1], "sha": "0" * 40, "siblings": siblings})
        return self._answer(404, {"error": self.path})

    def do_POST(self) -> None:
        body = self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if "/lfs/" not in self.path and token not in (TOKEN, READ_ONLY):
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.*", self.path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", self.path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", self.path):
            return self._commit(match[1], body)
        return self._answer(404, {"error": self.path})

    def do_PUT(self) -> None:
        data = self._body()
        with self.hub.lock:
            if self.hub.fails_after is not None and self.hub.num_sent >= self.hub.fails_after:
                return self._answer(400, {"error": "the storage is full"})
            self.hub.num_sent += 1
            self.hub.stored[hashlib.sha256(data).hexdigest()] = data
        return self._answer(200, {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        data = b""
        while nbytes := int(self.rfile.readline(), 16):
            data += self.rfile.read(nbytes)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _create(self, body: dict[str, Any], token: str) -> None:
        name = f"{body['organization']}/{body['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if token != TOKEN:
            return self._answer(403, {"error": "You don't have the rights to create a model"})
        if name in self.hub.files:
            return self._answer(409, {"error": "You already created this model repo", **url})
        self.hub.private[name] = body.get("private") or body.get("visibility") == "private"
        self.hub.files[name] = {".gitattributes": b""}
        return self._answer(200, url)

    def _batch(self, body: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for one in body["objects"]:
            known = one["oid"] in self.hub.stored
            href = f"{self.hub.url}/lfs/{one['oid']}"
            actions = {} if known else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.files[name])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.files[name] = files
        commit = {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40}
        self._answer(200, {"success": True, **commit})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
