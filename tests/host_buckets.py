"""A bucket that runs of `host_runs.py` save to, as a folder of checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import holdfast
from holdfast.storage.cloud import CloudBucket
from s3_server import s3_server

HOSTS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
]
"""Whether each rank is on a host of its own, for `parametrize`."""


class RunBucket:
    """A new bucket of the server of this process, with a folder for temporary files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        server = s3_server()
        self.temporary = tmp_path / "temporary"
        self.temporary.mkdir()
        self.environment = {**server.environment, "TMPDIR": str(self.temporary)}
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("tempfile.tempdir", str(self.temporary))
        self.url = f"s3://{server.new_bucket()}/run"

    def names(self, below: str = "") -> list[str]:
        """Names of the checkpoints and files at the URL, or below a folder of it. Leases of killed
        processes are left out."""
        found = CloudBucket(f"{self.url}/{below}".rstrip("/")).list("")
        files = [one.key for one in found.objects if not one.key.startswith(".held-")]
        return sorted([*found.prefixes, *files])

    def files(self, name: str) -> set[str]:
        """Relative paths of the files of a published checkpoint."""
        bucket = CloudBucket(f"{self.url}/{name}")
        published = json.loads(bucket.get("manifest.json", 1 << 20)[0])["folder"]
        keys = (one.key for one in bucket.list_all(published))
        return {key.removeprefix(f"{published}/") for key in keys}

    def damage(self, name: str, file: str) -> None:
        """Change every byte of the file of that name in a checkpoint."""
        bucket = CloudBucket(f"{self.url}/{name}")
        key = next(one.key for one in bucket.list_all("") if one.key.endswith(file))
        data = bytes(bucket.get(key, 1 << 30)[0])
        bucket.put(key, bytes(255 - byte for byte in data))

    def check_good(self, *names: str) -> None:
        """All these checkpoints are good, and no copy of one is left on this machine."""
        for name in names:
            assert holdfast.check(f"{self.url}/{name}") == []
        assert not list(self.temporary.rglob(".holdfast-*"))
