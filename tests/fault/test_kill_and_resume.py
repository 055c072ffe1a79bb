"""A killed run continues as if it had not been interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

import holdfast
from checkpoints import contents, differing
from runs import kill_all, losses, start, train, wait_for_step

KEEP = ("--checkpoint.no-last_save_model_only", "--checkpoint.interval", "10")
TWENTY = (*KEEP, "--training.steps", "20", "--training.global_batch_size", "4")


def test_ten_steps_kill_and_ten_more_equal_twenty_at_once(tmp_path: Path) -> None:
    """G2, G9. Method: 20 steps on 2 ranks, in one run and in a run that is killed after step 12 and
    started again. Parameters, optimizer state, schedule, generators, data position and losses are
    equal bit for bit."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    done = train(*TWENTY, ranks=2, cwd=straight)
    assert done.returncode == 0, done.stdout

    run = start(*TWENTY, ranks=2, cwd=broken)
    wait_for_step(broken / "outputs", 12)
    kill_all(run)
    assert not (broken / "outputs/checkpoint/step-20").exists()
    resumed = train(*TWENTY, ranks=2, cwd=broken)
    assert resumed.returncode == 0, resumed.stdout
    assert "resumed from step 10" in resumed.stdout

    expected = contents(straight / "outputs/checkpoint/step-20")
    found = contents(broken / "outputs/checkpoint/step-20")
    assert differing(found, expected) == []
    assert any(name.startswith("optimizer.state.") for name in expected)
    assert any(name.startswith("rng.rank_1.") for name in expected)
    assert losses(broken / "outputs") == losses(straight / "outputs")
    assert sorted(losses(broken / "outputs")) == list(range(1, 21))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """G9. Method: 4 ranks (2 x 2) are killed; 1 rank continues, and reports which state starts
    afresh."""
    run = start(*TWENTY, "--parallelism.tensor_parallel_degree", "2", ranks=4, cwd=tmp_path)
    wait_for_step(tmp_path / "outputs", 11)
    kill_all(run)
    resumed = train(*TWENTY, ranks=1, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout
    assert "resumed from step 10" in resumed.stdout
    assert "saved by 4 ranks, this run has 1" in resumed.stdout


def test_a_finished_run_says_so_and_more_steps_go_on_from_the_newest_full_one(
    tmp_path: Path,
) -> None:
    """G4. Method: a run whose last checkpoint has the model only; a start with more steps resumes
    from the full one before."""
    arguments = (
        "--checkpoint.interval",
        "4",
        "--checkpoint.last_save_model_only",
        "--checkpoint.export_dtype",
        "bfloat16",
    )
    assert train(*arguments, "--training.steps", "6", cwd=tmp_path).returncode == 0
    last = holdfast.open(tmp_path / "outputs/checkpoint/step-6")
    assert last.manifest.kind == "model"
    assert {entry.dtype for entry in last.tensors.values()} == {"bfloat16"}

    again = train(*arguments, "--training.steps", "6", cwd=tmp_path)
    assert again.returncode == 0
    assert "already at step 6 of 6" in again.stdout, again.stdout
    more = train(*arguments, "--training.steps", "8", cwd=tmp_path)
    assert more.returncode == 0, more.stdout
    assert "passed over step 6: it holds the model alone" in more.stdout
    assert "resumed from step 4" in more.stdout
