"""Timings of saves and loads in `metrics.jsonl` and in manifests."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import holdfast
from holdfast.comm import Ranks
from holdfast.dashboard.history import MetricsRow
from holdfast.manager.goodput import Timings
from holdfast.testing.ranks import run_ranks
from holdfast.trainer.config import MetricsConfig
from holdfast.trainer.metrics import Metrics
from runs import rows, train


def test_metrics_have_every_save_and_load_of_a_run_with_the_time_of_each_stage(
    tmp_path: Path,
) -> None:
    """Method: a run of two ranks that saves in the background, and its resume. The last row is
    written again with the last save; the first row has the load."""
    arguments = ("--checkpoint.interval", "2", "--checkpoint.async_mode", "async")
    for steps in ("5", "6"):
        run = train("--training.steps", steps, *arguments, ranks=2, cwd=tmp_path)
        assert run.returncode == 0, run.stdout
    written = rows(tmp_path / "outputs")
    assert [row["step"] for row in written][:5] == [1, 2, 3, 4, 5]
    last = {row["step"]: row for row in written}
    saves = [save for step in sorted(last) for save in last[step]["saves"]]
    loads = [load for step in sorted(last) for load in last[step]["loads"]]
    assert [save["step"] for save in saves] == [2, 4, 5, 6]
    assert [load["step"] for load in loads] == [5]
    for times in (*saves, *loads):
        assert times["nbytes"] > 0
        for stage in times["stages"].values():
            assert 0 <= stage["least"] <= stage["median"] <= stage["most"]
            assert stage["slowest"] in (0, 1)
    assert {"plan", "stage", "write", "sync", "commit"} == saves[0]["stages"].keys()
    assert {"plan", "read", "apply"} == loads[0]["stages"].keys()
    manifest = json.loads((tmp_path / "outputs/checkpoint/step-4/manifest.json").read_text())
    stages = {**saves[1]["stages"]}
    del stages["commit"]  # Not over when the manifest is written.
    assert manifest["timings"] == stages


def test_only_the_first_rank_returns_timings_and_only_once(tmp_path: Path) -> None:
    """Method: a manager on three thread ranks that saves and loads; two calls of `timings`."""

    def work(ranks: Ranks) -> list[Timings]:
        config = holdfast.CheckpointConfig(enable=True, interval=1)
        with holdfast.CheckpointManager(
            tmp_path, model=torch.nn.Linear(2, 2), config=config, ranks=ranks
        ) as manager:
            manager.save(1)
            manager.load()
            return [manager.timings(), manager.timings()]

    (first, again), *others = run_ranks(3, work)
    assert [times.step for times in (*first.saves, *first.loads)] == [1, 1]
    for times in (*first.saves, *first.loads):
        stages = times.stages.values()
        assert sum(s.least for s in stages) <= times.seconds + 1e-5
        assert times.seconds <= sum(s.most for s in stages) + 1e-5
    assert [again, *(timings for both in others for timings in both)] == [Timings()] * 5


def test_failed_saves_are_counted(tmp_path: Path) -> None:
    """Method: the last row of a run, and the same row with a failure after it."""
    row = MetricsRow(1, 2.0, 1.0, 0.1, 10.0, 0.0, 1000.0, failed_saves=1)
    metrics = Metrics(MetricsConfig(), tmp_path, first_rank=True, step=0)
    metrics.report(row, torch.device("cpu"))
    metrics.close(Timings(failed_saves=2))
    assert [written["failed_saves"] for written in rows(tmp_path)] == [1, 3]
