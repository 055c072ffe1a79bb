"""What a run writes down of its saves."""

from __future__ import annotations

from pathlib import Path

import holdfast
from holdfast.engine.ranks import Ranks
from holdfast.engine.spans import SaveTimes
from holdfast.testing.ranks import run_ranks
from runs import rows, train


def test_every_save_of_a_run_is_in_its_metrics_with_the_time_of_each_stage(tmp_path: Path) -> None:
    """Method: a run of two ranks, which saves in the background; the last save comes with the last
    row, written again."""
    arguments = ("--checkpoint.interval", "2", "--checkpoint.async_mode", "async")
    ran = train("--training.steps", "5", *arguments, ranks=2, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    found = rows(tmp_path / "outputs")
    assert [row["step"] for row in found][:5] == [1, 2, 3, 4, 5]
    last = {row["step"]: row for row in found}
    saves = [save for step in sorted(last) for save in last[step]["saves"]]
    assert [save["step"] for save in saves] == [2, 4, 5]
    for save in saves:
        assert {"plan", "stage", "write", "commit"} <= save["stages"].keys()
        assert save["nbytes"] > 0
        for stage in save["stages"].values():
            assert 0 <= stage["least"] <= stage["median"] <= stage["most"]
            assert stage["slowest"] in (0, 1)


def test_the_first_rank_alone_knows_them_and_once(tmp_path: Path) -> None:
    """Method: a manager on three ranks that are threads."""
    import torch

    def work(ranks: Ranks) -> list[SaveTimes]:
        config = holdfast.CheckpointConfig(enable=True, interval=1)
        with holdfast.CheckpointManager(
            tmp_path, model=torch.nn.Linear(2, 2), config=config, ranks=ranks
        ) as manager:
            manager.save(1)
            times = manager.timed_saves()
            assert manager.timed_saves() == []
            return times

    first, *others = run_ranks(3, work)
    assert [times.step for times in first] == [1]
    stages = first[0].stages.values()
    assert sum(s.least for s in stages) <= first[0].seconds <= sum(s.most for s in stages)
    assert others == [[], []]
