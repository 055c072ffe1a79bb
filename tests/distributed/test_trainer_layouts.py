"""Resumes of a real run in another layout, and refused settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from runs import losses
from warm import python


def launched(folder: Path, *arguments: str, workers: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a few short steps, as `run_train.sh` does."""
    text = folder.parent / "text.txt"
    text.write_text(Path(__file__).read_text())
    command = (
        f"{python()} -W error -m holdfast.trainer.launch --job.dump_folder {folder} "
        f"--training.dataset_path {text} --training.seq_len 32 "
        "--training.local_batch_size 1 --training.global_batch_size 4 --metrics.log_freq 1 "
        "--checkpoint.enable --checkpoint.interval 3 --lr_scheduler.total_steps 6 "
        "--lr_scheduler.warmup_steps 1 --checkpoint.no-last_save_model_only"
    )
    return subprocess.run(
        [*command.split(), *arguments],
        env=os.environ | {"NGPU": str(workers), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_resumes_in_another_layout_but_not_with_other_data(tmp_path: Path) -> None:
    """Method: train five steps with a save after three. Resume from there with tensor parallelism
    for two steps. A run without steps left ends at once, and other data are refused."""
    folder, other = tmp_path / "whole", tmp_path / "other"
    done = launched(folder, "--training.steps", "5")
    assert done.returncode == 0, done.stderr
    (other / "checkpoint").mkdir(parents=True)
    (other / "checkpoint/step-3").symlink_to(folder / "checkpoint/step-3")
    tensor_parallel = ("--parallelism.tensor_parallel_degree", "2", "--checkpoint.load_step", "3")
    done = launched(other, "--training.steps", "5", *tensor_parallel, "--checkpoint.load_only")
    assert done.returncode == 0, done.stderr
    assert "training from step 3 to 5" in done.stdout
    assert sorted(losses(other)) == [4, 5]
    for step, loss in losses(other).items():
        assert loss == pytest.approx(losses(folder)[step], abs=1e-4)
    done = launched(folder, "--training.steps", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert "already at step 5 of 5: nothing to do" in done.stdout
    assert "step 4" not in done.stdout
    done = launched(folder, "--training.steps", "7", "--training.seed", "1")
    assert done.returncode == 6
    assert done.stderr.count("error: ") == 1
    assert "`seed` is 0 in the checkpoint and 1 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_is_reported_once_before_workers_start(tmp_path: Path) -> None:
    """Method: misspell a key, and check output and exit status."""
    done = launched(tmp_path, "--training.step", "6")
    assert done.returncode == 2
    assert done.stderr.startswith("error: `--training.step`: key `training.step` is not known\n")
    assert done.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())
