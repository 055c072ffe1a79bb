"""Seed checkpoints: the whole model's initial weights, for any layout to start from."""

from __future__ import annotations

from pathlib import Path

import torch

import holdfast
from runs import train

SEED = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint")


def test_a_seed_holds_the_model_as_it_starts_and_nothing_else(tmp_path: Path) -> None:
    """Method: the weights against those of a run of no step with the same seed; a second seed in
    the same folder, and one by two workers, are refused."""
    done = train(*SEED, "--training.seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    seed = holdfast.open(tmp_path / "outputs" / "checkpoint" / "step-0")
    assert seed.manifest.kind == "model"
    assert not seed.manifest.values
    assert all(entry.dtype == "float32" for entry in seed.tensors.values())
    run = train(
        *("--training.seed", "5", "--training.steps", "1", "--optimizer.lr", "0"),
        *("--checkpoint.folder", "other", "--optimizer.weight_decay", "0"),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout
    started = holdfast.open(tmp_path / "outputs" / "other" / "step-1")
    for name in seed.tensors:
        assert torch.equal(seed.read(name), started.read(name)), name

    again = train(*SEED, cwd=tmp_path)
    assert again.returncode == 5
    assert "holds step 0" in again.stdout
    two = train(*SEED, ranks=2, cwd=tmp_path)
    assert two.returncode == 2
    assert "builds the whole model on one worker, there are 2" in two.stdout
