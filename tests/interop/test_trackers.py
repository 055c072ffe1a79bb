"""The programs of the page on trackers, with the real packages, without a network."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from pages import GUIDE, blocks

# These packages warn about themselves and about each other.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with all programs of the page."""
    for _, text in blocks(GUIDE["trackers"].read_text()):
        if name := re.match(r"# (\w+\.py)\n", text):
            (tmp_path / name[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackers", raising=False)
    return tmp_path


def needs(package: str) -> Any:
    """The package. It is no dependency of the tests: its 15 to 30 packages are for this alone."""
    return pytest.importorskip(
        package, reason=f"`{package}` is not installed: pip install {package}"
    )


@pytest.mark.slow
def test_weights_and_biases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the run's file has one artifact per checkpoint, with its path and its metrics."""
    wandb = needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runpy.run_path("with_wandb.py")
    # Its own process writes the file.
    wandb.teardown()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    for step in (5, 10):
        assert f"step-{step}".encode() in data
        assert f"file://{folder}/outputs/tracked/step-{step}".encode() in data


@pytest.mark.slow
def test_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local store has the loss of both checkpoints, and the path of the last."""
    mlflow = needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{folder}/mlruns")
    runpy.run_path("with_mlflow.py")
    client = mlflow.MlflowClient()
    run = client.get_run(mlflow.last_active_run().info.run_id)
    assert run.data.tags["checkpoint"] == str(folder / "outputs/tracked/step-10")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [5, 10]


def test_tensorboard(folder: Path) -> None:
    """The event file has the loss and the path of both checkpoints."""
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runpy.run_path("with_tensorboard.py")
    events = EventAccumulator(str(folder / "outputs/tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("checkpoint/loss")] == [5, 10]
    texts = events.Tensors("checkpoint/path/text_summary")
    paths = [one.tensor_proto.string_val[0].decode() for one in texts]
    assert paths == [str(folder / f"outputs/tracked/step-{step}") for step in (5, 10)]
