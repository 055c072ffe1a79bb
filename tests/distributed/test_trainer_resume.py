"""Exact resumes in every layout, from a common seed checkpoint, and in another layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from checkpoints import contents, differing
from extent import some
from holdfast.trainer.train import train
from layouts import Layout, add_flavors, parallel_context
from processes import run_processes
from runs import losses

LAYOUTS = some(
    [
        Layout("shard2 cp2 ep2", "experts"),
        Layout("pp2 tp2", schedule="Interleaved1F1B"),
        Layout("replicate2 shard2"),
        Layout("replicate2 cp2"),
        Layout("pp2 shard2 ep2", "experts"),
    ],
    1,
)
pytestmark = pytest.mark.timeout(400)  # the fixture takes many runs

MOVES = some(
    [
        (Layout("shard2 cp2 ep2", "experts"), Layout("pp2 shard2 ep2", "experts")),
        (Layout("replicate2 shard2"), Layout("pp2 tp2", schedule="Interleaved1F1B")),
    ],
    1,
)
"""Layouts of the first and of the second half of a run."""

ALONE = [Layout("", "small"), Layout("", "experts")]
STEPS = 4


def run(layout: Layout, folder: Path, *, steps: int) -> None:
    """Train with AdamW as one rank of the reference run. Collective."""
    arguments = (
        "--optimizer.name AdamW --optimizer.lr 0.01 --lr_scheduler.warmup_steps 1 "
        f"--lr_scheduler.total_steps {STEPS} --training.steps {steps} --metrics.log_freq 1 "
        "--training.global_batch_size 4 --training.local_batch_size 1 "
        "--checkpoint.enable --checkpoint.no-last_save_model_only"
    )
    paths = ["--job.dump_folder", str(folder), "--training.dataset_path", str(folder / "text.txt")]
    config = layout.config(*arguments.split(), *paths)
    train(config, parallel_context(config))


def run_both(rank: int, size: int, layout: Layout, folder: Path) -> None:
    """Run a layout without interruption, and in two halves."""
    add_flavors()
    for name in ("whole", "halves"):
        out = folder / str(layout) / name
        if rank == 0:
            shutil.copytree(folder / f"{layout.kind} seed", out)
        if size > 1:
            dist.barrier()
        if name == "halves":
            run(layout, out, steps=STEPS // 2)
        run(layout, out, steps=STEPS)


def move(rank: int, size: int, before: Layout, after: Layout, folder: Path) -> None:
    """Run the second half of one layout's run in another layout."""
    add_flavors()
    out = folder / f"{before} then {after}"
    if rank == 0:
        later = shutil.ignore_patterns(f"step-{STEPS}", "metrics.jsonl")
        shutil.copytree(folder / str(before) / "halves", out, ignore=later)
    dist.barrier()
    run(after, out, steps=STEPS)


def seed(rank: int, size: int, layout: Layout, folder: Path) -> None:
    add_flavors()
    arguments = "--training.seed 99 --checkpoint.enable --checkpoint.create_seed_checkpoint"
    config = layout.config(*arguments.split(), "--job.dump_folder", str(folder))
    train(config, parallel_context(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every layout from a common seed checkpoint, of another `training.seed` than the runs."""
    folder = tmp_path_factory.mktemp("runs")
    for layout in ALONE:
        seed_folder = folder / f"{layout.kind} seed"
        run_processes(1, seed, layout, seed_folder)
        (seed_folder / "text.txt").write_text(Path(__file__).read_text())
        run_processes(1, run_both, layout, folder)
    for layout in LAYOUTS:
        run_processes(4, run_both, layout, folder)
    for before, after in MOVES:
        run_processes(4, move, before, after, folder)
    return folder


def last_of(folder: Path) -> dict[str, Any]:
    return contents(folder / "checkpoint" / f"step-{STEPS}")


@pytest.mark.parametrize("layout", [*ALONE, *LAYOUTS], ids=str)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    layout: Layout, folder: Path
) -> None:
    """G9: losses, weights, AdamW, schedule, data position and random numbers are equal bit for
    bit."""
    whole, halves = folder / str(layout) / "whole", folder / str(layout) / "halves"
    assert losses(whole) == losses(halves)
    expected = last_of(whole)
    assert any(name.startswith("rng.") for name in expected)
    assert differing(last_of(halves), expected) == []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_has_the_same_losses_from_a_seed_checkpoint(
    layout: Layout, folder: Path
) -> None:
    """Method: compare with one process that starts from the same seed checkpoint."""
    expected = losses(folder / str(Layout("", layout.kind)) / "whole")
    found = losses(folder / str(layout) / "whole")
    assert found[1] == pytest.approx(expected[1], abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("before", "after"), MOVES, ids=str)
def test_a_run_resumes_in_another_layout_with_the_next_samples(
    before: Layout, after: Layout, folder: Path
) -> None:
    """G9: the second half of a run in another layout uses the next samples. Method: compare losses
    with one process, and the position in the data with the run that kept its layout."""
    moved = folder / f"{before} then {after}"
    found, alone = losses(moved), losses(folder / str(Layout("", before.kind)) / "whole")
    assert sorted(found) == [STEPS // 2 + 1, STEPS]
    assert found == pytest.approx({step: alone[step] for step in found}, abs=1e-3)
    stayed = last_of(folder / str(before) / "whole")
    for name, value in last_of(moved).items():
        if name.startswith(("dataloader.", "train_state.")):
            assert value == stayed[name], name
