"""Azurite, the emulator of Azure's blobs, on loopback: `npm install -g azurite`."""

from __future__ import annotations

import atexit
import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
from datetime import UTC, datetime
from functools import cache
from itertools import count
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

ACCOUNT = "devstoreaccount1"

KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's documented key, which is the same everywhere."""

_VERSION = "2021-12-02"

_START_S = 60.0

_numbers = count()


@cache
def _endpoint() -> str | None:
    """Start the server of this process, if it is installed. Returns its endpoint."""
    command = shutil.which("azurite-blob")
    if command is None:
        return None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    options += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL)
    atexit.register(process.kill)
    endpoint, until = f"http://127.0.0.1:{port}/{ACCOUNT}", time.monotonic() + _START_S
    while True:
        try:
            _make_container(endpoint, "first")
            return endpoint
        except URLError:
            assert process.poll() is None, "azurite-blob has ended"
            assert time.monotonic() < until, "azurite-blob does not answer"
            time.sleep(0.1)


def _make_container(endpoint: str, name: str) -> None:
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = f"x-ms-date:{date}\nx-ms-version:{_VERSION}"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    text = f"PUT{12 * chr(10)}{headers}\n{resource}".encode()
    signature = hmac.new(base64.b64decode(KEY), text, hashlib.sha256).digest()
    request = Request(f"{endpoint}/{name}?restype=container", method="PUT")
    request.add_header("x-ms-date", date)
    request.add_header("x-ms-version", _VERSION)
    request.add_header("Content-Length", "0")
    request.add_header(
        "Authorization", f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
    )
    with urlopen(request):
        pass


def new_azure_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a new container, which the environment leads to. Skips the test if Azurite
    is not installed."""
    endpoint = _endpoint()
    if endpoint is None:
        pytest.skip("needs Azurite: npm install -g azurite")
    name = f"container-{next(_numbers)}"
    _make_container(endpoint, name)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    return f"az://{name}"
