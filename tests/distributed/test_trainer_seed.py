"""Seed checkpoints: the whole model's initial weights, from which any layout can start."""

from __future__ import annotations

from pathlib import Path

import torch

import holdfast
from runs import train

SEED = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint")


def test_a_seed_checkpoint_has_the_initial_weights_and_nothing_else(tmp_path: Path) -> None:
    """Method: compare the seed checkpoint with a run of the same seed and a learning rate of 0. A
    second seed checkpoint in the same folder, and one by two workers, are refused."""
    done = train(*SEED, "--training.seed", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    seed = holdfast.open(tmp_path / "outputs" / "checkpoint" / "step-0")
    assert seed.manifest.kind == "model"
    assert not seed.manifest.values
    assert all(entry.dtype == "float32" for entry in seed.tensors.values())
    arguments = (
        "--training.seed 5 --training.steps 1 --optimizer.lr 0 --optimizer.weight_decay 0 "
        "--checkpoint.folder other"
    )
    run = train(*arguments.split(), cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    started = holdfast.open(tmp_path / "outputs" / "other" / "step-1")
    for name in seed.tensors:
        assert torch.equal(seed.read(name), started.read(name)), name

    again = train(*SEED, cwd=tmp_path)
    assert again.returncode == 5
    assert "holds step 0" in again.stdout
    two = train(*SEED, ranks=2, cwd=tmp_path)
    assert two.returncode == 2
    assert "builds the whole model on one worker, found: 2 workers" in two.stdout
