"""The fast tier of a run in the table of runs, in metrics and in JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from asking import Answer, ask
from browser import CHROMIUM, Browser
from fast_tier import Run
from fleets import read_often, served, wait_for, watched
from holdfast.catalog.tier import host_stores, read_tier
from holdfast.dashboard.condition import Limits
from holdfast.dashboard.web import app_of
from holdfast.storage.local import LocalStore


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read often, so that no test waits."""
    read_often(monkeypatch)


@contextmanager
def asked(folder: Path) -> Iterator[Any]:
    """Serve a run in this process. The context gives a function that requests a path."""
    with watched(folder) as fleet:
        app = app_of(fleet, {"localhost"}, Limits(), None)

        def get(path: str) -> Answer:
            return ask(app, path)

        yield get


def tier_in(get: Any) -> dict[str, Any]:
    """The fast tier, as the JSON of the run says."""
    found: dict[str, Any] = json.loads(get("/api/runs/0").body)["fast_tier"]
    return found


@pytest.mark.parametrize("replicas", [0, 1])
def test_the_tiers_of_a_run_are_shown(tmp_path: Path, replicas: int) -> None:
    """Method: ten steps on three hosts, of which the folder of the run has step 8; then more steps,
    and a host that is lost."""
    run = Run(tmp_path, local_replicas=replicas)
    run.train(10)
    with asked(tmp_path / "run") as get:
        assert tier_in(get) == {
            "hosts": ["node0", "node1", "node2"],
            "step": 10,
            "num_files": 4,
            "num_seen": 4,
            "copies": 1 + replicas,
            "behind": 2,
        }
        page = get("/runs").body
        assert "local 10, copy 2 behind" in page
        note = "each file of local step 10 is on 2 hosts" if replicas else "10 has no replica"
        assert note in page
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(get("/metrics").body)
            for sample in family.samples
        }
        assert found["holdfast_local_hosts"] == 3
        assert found["holdfast_local_step"] == 10
        assert found["holdfast_local_steps_not_copied"] == 2
        assert found["holdfast_local_copies"] == 1 + replicas
        run.train(12)
        wait_for(lambda: [tier_in(get)[key] for key in ("step", "behind")], [12, 0])
        shutil.rmtree(tmp_path / "disks/node0")
        wait_for(lambda: tier_in(get)["copies"], replicas)
        lost = "2 of 4 files of local step 12 are on the hosts seen"
        # The page is kept for a second.
        wait_for(lambda: lost in get("/runs").body, not replicas)


def test_hosts_that_cannot_be_seen_are_said_so(tmp_path: Path) -> None:
    """Method: the disks of all hosts are away; then the record of the tier is damaged."""
    run = Run(tmp_path)
    run.train(10)
    (tmp_path / "disks").rename(tmp_path / "away")
    with asked(tmp_path / "run") as get:
        assert tier_in(get)["hosts"] == []
        assert "this machine sees no checkpoint in its fast tier" in get("/runs").body
        assert "holdfast_local_step" not in get("/metrics").body
        (tmp_path / "run/.tier.json").write_text("{")
        wait_for(lambda: tier_in(get), None)
        assert get("/runs").status == 200


@pytest.mark.parametrize(
    ("place", "made", "seen"),
    [
        ("disks/{host}", ["disks/a", "disks/b"], ["a", "b"]),
        ("disks/x-{host}-y/z", ["disks/x-a-y/z", "disks/b", "disks/x-b-y"], ["a"]),
        ("disks", ["disks"], [""]),
        ("{host}/{host}", ["a/a", "b/a"], ["a"]),
    ],
)
def test_hosts_are_seen_by_the_place_of_their_folders(
    tmp_path: Path, place: str, made: list[str], seen: list[str]
) -> None:
    """Method: the name of the host as a folder, as a part of one, nowhere and twice."""
    (tmp_path / "run").mkdir()
    record = {"id": f"run-{0:016x}", "local_folder": f"{tmp_path}/{place}"}
    (tmp_path / "run/.tier.json").write_text(json.dumps(record))
    for folder in made:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for folder in made:
        if not folder.endswith("x-b-y"):
            (tmp_path / folder / f"run-{0:016x}").mkdir()
    tier = read_tier(LocalStore(str(tmp_path)), "run")
    assert tier is not None
    found = host_stores(tier)
    assert len(found) == len(seen)
    assert place == "disks" or sorted(found) == seen


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_how_far_the_copy_is_behind(tmp_path: Path) -> None:
    """Method: the page is open while the run goes on. A phone shows it too."""
    run = Run(tmp_path, local_replicas=1)
    run.train(10)
    with served(tmp_path / "run") as url, Browser(tmp_path / "profile") as browser:
        browser.appear(1280)
        browser.open(f"{url}runs")
        browser.wait_for("local 10, copy 2 behind")
        assert browser.run("document.documentElement.scrollWidth") == 1280
        browser.run("window.opened = 'once'")
        run.train(12)
        shown = browser.wait_for("local 12")
        assert "behind" not in shown
        assert "on 2 hosts" in shown
        assert browser.run("window.opened") == "once"
        browser.appear(390, 844)
        assert browser.run("document.documentElement.scrollWidth") == 390
