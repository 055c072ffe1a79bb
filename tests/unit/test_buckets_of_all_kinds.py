"""Checkpoints in buckets of S3, Azure and Google: saved, loaded, replaced, pruned, kept apart."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

import holdfast
from azure_server import new_azure_url
from google_server import new_google_url
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.paths import open_parent
from holdfast.cli.main import main as cli
from holdfast.errors import ExistsError
from holdfast.hosts.at_urls import saved_file
from holdfast.storage.cloud import CloudBucket
from holdfast.storage.objects import ObjectStore
from s3_server import new_s3_url

KINDS: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "s3": new_s3_url,
    "az": new_azure_url,
    "gs": new_google_url,
}


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new run in a new bucket of each kind."""
    return f"{KINDS[request.param](monkeypatch)}/run"


def state(value: float) -> dict[str, torch.Tensor]:
    # More than two parts of an upload, and a last one that is short.
    return {"w": torch.full((5_000_000,), value), "b": torch.full((3,), -value)}


def test_a_checkpoint_is_saved_loaded_and_replaced_only_when_asked(url: str) -> None:
    """G1, G2. Method: a file of several parts; a second save without `overwrite`, then with it."""
    for value in (1.0, 2.0):
        holdfast.save(f"{url}/step-1", state(value), overwrite=value > 1)
        found = state(0.0)
        holdfast.load(f"{url}/step-1", found)
        assert all(torch.equal(found[name], state(value)[name]) for name in found)
        with pytest.raises(ExistsError, match="exists already"):
            holdfast.save(f"{url}/step-1", state(9.0))
    assert cli(["verify", url]) == 0


def manager(url: str) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    return CheckpointManager(url, model=torch.nn.Linear(3, 3), config=config)


def test_files_of_another_program_are_sealed_and_copied_back(url: str, tmp_path: Path) -> None:
    """Method: two checkpoints, a save that replaces the newest one, and a file that is replaced."""
    for step, content in ((1, b"1"), (2, b"2"), (2, b"3" * (9 << 20))):
        with holdfast.sealed(f"{url}/checkpoint-{step}", overwrite=True) as folder:
            (folder / "inner").mkdir()
            (folder / "inner/state").write_bytes(content)
    newest = holdfast.newest_good(url, fetch_to=tmp_path)
    assert newest is not None
    assert (newest / "inner/state").read_bytes() == b"3" * (9 << 20)
    for value in (b"1", b"2" * (9 << 20), b"3"):
        with saved_file(f"{url}/last.ckpt") as file:
            file.write(value)
        store, name = open_parent(f"{url}/last.ckpt")
        assert store.read(name, 0, store.size(name)) == value


def test_a_run_is_resumed_and_pruned(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """G16. Method: four steps, a second run beside the first, a resume, and a prune."""
    with manager(url) as first:
        for step in range(1, 5):
            first.save(step)
        with pytest.raises(ExistsError, match="in use by another run"):
            manager(url).save(5)
    with manager(url) as second:
        assert second.load().step == 4
    assert cli(["prune", url, "--keep-latest-k", "2"]) == 0
    store = ObjectStore(CloudBucket(url))
    assert Catalog(store).steps() == [3, 4]
    assert [name for name in store.list() if name.startswith(".")] == []
    assert cli(["verify", url]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_copies_the_files_of_tensors_that_have_not_changed(url: str) -> None:
    """G19. Method: a frozen layer and a trained one, on servers; a resume in between. Everything is
    loaded bit for bit after the earlier checkpoints are deleted."""
    frozen, trained = torch.nn.Linear(600, 600), torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(frozen, trained)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0, deduplicate=True)
    for start in (0, 3):
        with CheckpointManager(url, model=model, config=config) as manager:
            for step in range(start + 1, start + 4):
                torch.nn.init.constant_(trained.weight, step)
                saved = manager.save(step)
                assert saved
    assert cli(["prune", url, "--keep-latest-k", "2"]) == 0
    assert cli(["verify", url]) == 0
    found = holdfast.open(f"{url}/step-6")
    assert torch.equal(found.read("0.weight"), frozen.weight)
    assert torch.equal(found.read("1.weight"), torch.full((3, 3), 6.0))


def test_of_two_saves_of_one_checkpoint_one_succeeds(url: str) -> None:
    """G16. Method: two at once, each through a connection of its own. The one that succeeds is
    there; the other names it."""
    ends: dict[float, BaseException | None] = {}
    start = Barrier(2)

    def save(value: float) -> None:
        start.wait()
        try:
            holdfast.save(f"{url}/step-1", state(value))
            ends[value] = None
        except ExistsError as error:
            ends[value] = error

    threads = [Thread(target=save, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [value for value, error in ends.items() if error is None]
    (lost,) = [error for error in ends.values() if error is not None]
    assert "step-1" in str(lost)
    found = state(0.0)
    holdfast.load(f"{url}/step-1", found)
    assert torch.equal(found["w"], state(won)["w"])


PROGRAM = """
import sys, torch
from holdfast import CheckpointConfig, CheckpointManager
config = CheckpointConfig(enable=True, interval=1, async_mode="async")
manager = CheckpointManager(sys.argv[1], model=torch.nn.Linear(1000, 5000), config=config)
manager.save(1)
manager.save(2)
"""


def test_a_program_that_simply_ends_finishes_its_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """G17. Method: a program that does not close its manager, and ends during a save in the
    background, whose upload uses a pool of threads."""
    url = f"{new_s3_url(monkeypatch)}/run"
    command = [sys.executable, "-c", PROGRAM, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert holdfast.check(f"{url}/step-2") == []
