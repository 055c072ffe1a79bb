"""`holdfast serve` of runs in a bucket, of a real server."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import holdfast
from asking import ask
from fleets import read_often, watched
from holdfast.cli.main import main
from holdfast.dashboard.condition import Limits
from holdfast.dashboard.history import HistoryReader
from holdfast.dashboard.watch import Fleet
from holdfast.dashboard.web import app_of
from holdfast.storage.cloud import CloudBucket
from s3_server import s3_server


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a folder of two runs, of three checkpoints and of one, in a new bucket."""
    read_often(monkeypatch)
    server = s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{server.new_bucket()}/runs"
    save(f"{url}/a/checkpoint", 3)
    save(f"{url}/b/checkpoint", 1)
    return url


def save(folder: str, num_steps: int) -> None:
    """Save the steps of a run."""
    model = torch.nn.Linear(3, 2)
    config = holdfast.CheckpointConfig(enable=True, interval=1)
    with holdfast.CheckpointManager(folder, model=model, config=config) as manager:
        for step in range(1, num_steps + 1):
            manager.save(step)


@pytest.fixture
def requests() -> Iterator[Counter[str]]:
    """Number of requests to the server, by method."""
    counts: Counter[str] = Counter()

    def count(environ: dict[str, Any]) -> None:
        counts[environ["REQUEST_METHOD"]] += 1

    with s3_server().answering(count):
        yield counts


def shown(fleet: Fleet, text: str) -> str:
    """Wait until the page about all runs says this. Returns the page."""
    app = app_of(fleet, {"localhost"}, Limits(), None)
    deadline = time.monotonic() + 30
    while text not in (page := ask(app, "/runs").body):
        assert time.monotonic() < deadline, page
        time.sleep(0.1)
    return page


def test_runs_in_a_bucket_are_found_and_watched(runs: str) -> None:
    """Method: the folder above two runs; then one saves again, a file of the other is deleted, and
    a third run begins."""
    with watched(runs) as fleet:
        page = shown(fleet, "<b>2</b> good")
        assert f"{runs}/a/checkpoint" in page
        assert ">a</a>" in page
        app = app_of(fleet, {"localhost"}, Limits(), None)
        checkpoints = json.loads(ask(app, "/api/runs/1").body)["checkpoints"]
        assert [row["step"] for row in checkpoints] == [1, 2, 3]
        assert "Checkpoints" in ask(app, "/runs/1").body
        assert f'folder="{runs}/a/checkpoint"' in ask(app, "/metrics").body
        save(f"{runs}/c", 1)
        bucket = CloudBucket(f"{runs}/b/checkpoint")
        bucket.delete([one.key for one in bucket.list_all("step-1") if "distcp" in one.key])
        page = shown(fleet, "<b>1</b> damaged")
        assert "`__0_0.distcp` is missing" in page
        shown(fleet, "<b>2</b> good")


def test_a_look_at_an_unchanged_run_takes_few_requests(runs: str, requests: Counter[str]) -> None:
    """Method: three checkpoints, which no request reads again; then a checkpoint is replaced by one
    of the same size."""
    folder = f"{runs}/a/checkpoint"
    reader = HistoryReader(folder)
    first = reader.read()
    assert [row.step for row in first.rows] == [1, 2, 3]
    requests.clear()
    assert reader.read() is first
    # One listing; the two places of the metrics are looked at.
    assert requests == {"GET": 1, "HEAD": 1}
    holdfast.save(f"{folder}/step-3", {"own": torch.zeros(9)}, overwrite=True)
    assert reader.read().rows[-1].nbytes != first.rows[-1].nbytes


def test_a_bucket_that_does_not_answer_is_unreadable(runs: str) -> None:
    """Method: every answer is a refusal; then the server recovers."""
    with watched(f"{runs}/a/checkpoint") as fleet:
        shown(fleet, "<b>1</b> good")
        with s3_server().answering(lambda _: ("403 Forbidden", b"")):
            shown(fleet, "<b>1</b> unreadable")
        shown(fleet, "<b>1</b> good")


def test_a_url_of_no_bucket_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "memory://run/checkpoint"]) == 2
    assert "cannot watch: it watches folders and buckets" in capsys.readouterr().err
    assert main(["serve", "s3://bucket"]) == 2
    assert "is a whole bucket" in capsys.readouterr().err
