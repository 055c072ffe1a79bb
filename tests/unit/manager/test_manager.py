"""The manager with a plain module and no process group."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager


class Counter:
    """A Stateful of plain values."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "nested": {"list": [self.seen, "x"]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["nested"]["list"] == [state_dict["seen"], "x"]
        self.seen = state_dict["seen"]


class Run:
    """A run of a small model with dropout, which depends on the random number generators."""

    def __init__(self, folder: Path, width: int = 6, **settings: Any) -> None:
        self.model = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (n + 1))
        self.data = Counter()
        self.width = width
        settings = {"enable": True, "interval": 2, "last_save_model_only": False} | settings
        self.manager = CheckpointManager(
            folder,
            model=self.model,
            optimizers=self.optimizer,
            lr_schedulers=self.scheduler,
            dataloader=self.data,
            config=CheckpointConfig(**settings),
        )

    def until(self, last: int) -> int:
        """Resume, train to step `last`, close. Returns the step resumed from."""
        with self.manager as manager:
            first = step = manager.load()
            while step < last:
                self.optimizer.zero_grad()
                self.model(torch.rand(3, self.width)).square().sum().backward()
                self.optimizer.step()
                self.scheduler.step()
                self.data.seen += 1
                step += 1
                manager.save(step, last_step=step == last)
        return first

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    """G9: after dropout, schedule and random batches, all parameters are bit-identical."""
    torch.manual_seed(5)
    straight = Run(tmp_path / "straight")
    straight.until(8)
    torch.manual_seed(5)
    Run(tmp_path / "broken").until(4)
    resumed = Run(tmp_path / "broken")
    torch.manual_seed(99)
    assert resumed.until(8) == 4
    assert equal(resumed.parameters(), straight.parameters())
    assert resumed.data.seen == 8
    assert resumed.scheduler.last_epoch == 8
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"]


def test_retention_keeps_the_latest_k_and_ignores_other_folders(tmp_path: Path) -> None:
    """G5: folders whose names only resemble a step's are neither counted nor deleted."""
    foreign = ["best-step-20", "step-30.bak", "old-step-7-keep", "step-007", "step-"]
    for name in foreign:
        (tmp_path / name).mkdir()
    Run(tmp_path, keep_latest_k=3).until(12)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*foreign, ".lock", "step-8", "step-10", "step-12"}


def test_damaged_steps_never_displace_good_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G5: with two damaged newest steps, the two good ones before them stay. The log says that the
    run will replace the damaged ones."""
    Run(tmp_path, keep_latest_k=2).until(4)
    for step in (6, 8):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/__0_0.distcp").write_bytes(b"torn")
    run = Run(tmp_path, keep_latest_k=2, interval=1)
    with caplog.at_level(logging.WARNING, "holdfast"):
        assert run.until(5) == 4
    assert steps(tmp_path) == [4, 5, 6, 8]
    assert "steps [6, 8] are newer than step 4: they stay, each until this run" in caplog.text


def test_load_step_protects_that_step_and_newer_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G5: a run of 8 steps is resumed from step 4. Step 4 stays, and so do steps 6 and 8
    of the branch that was left."""
    Run(tmp_path).until(8)
    with caplog.at_level(logging.WARNING, "holdfast"):
        assert Run(tmp_path, load_step=4, keep_latest_k=2, interval=1).until(7) == 4
    assert "[6, 8] are newer than step 4" in caplog.text
    assert steps(tmp_path) == [4, 6, 7, 8]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    """G1: the folder is a new one, without any file of the old one."""
    Run(tmp_path).until(4)
    before = (tmp_path / "step-4").stat().st_ino
    Run(tmp_path, load_step=2).until(4)
    assert (tmp_path / "step-4").stat().st_ino != before
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-2", "step-4"}


def test_excluded_components_keep_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`data_loader` and `dataloader` are one key. The log names what was left out."""
    Run(tmp_path).until(4)
    for spelling in ("data_loader", "dataloader"):
        run = Run(tmp_path, exclude_from_loading=(spelling, "lr_scheduler"))
        with caplog.at_level(logging.INFO, "holdfast"):
            assert run.until(4) == 4
        assert "resumed from step 4, without lr_scheduler, dataloader: " in caplog.text
        caplog.clear()
        assert run.data.seen == 0
        assert run.scheduler.last_epoch == 0
    whole = Run(tmp_path)
    whole.until(4)
    assert whole.data.seen == 4


def test_the_error_about_an_unknown_excluded_component_suggests_a_similar_name(
    tmp_path: Path,
) -> None:
    with pytest.raises(holdfast.UsageError, match="did you mean `optimizer`"):
        Run(tmp_path, exclude_from_loading=("optimzer",))


def test_load_only_saves_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    Run(tmp_path).until(4)
    writing = Run(tmp_path)
    reading = Run(tmp_path, load_only=True)
    assert reading.until(8) == 4
    assert steps(tmp_path) == [2, 4]
    writing.manager.close()


def test_a_second_manager_of_a_folder_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    """G16. Method: two managers in one process, as when a notebook cell runs twice. The error names
    this process, and keeps no reference to the folder."""
    first = Run(tmp_path)
    for _ in range(2):
        with pytest.raises(holdfast.ExistsError, match="held by this process already: host"):
            Run(tmp_path)
    first.manager.close()
    Run(tmp_path).manager.close()


def test_initial_load_path_is_used_only_while_the_folder_is_empty(tmp_path: Path) -> None:
    """It gives the model by default, or all components."""
    source = Run(tmp_path / "source")
    source.until(4)
    path = str(tmp_path / "source/step-4")
    fresh = Run(tmp_path / "fresh", initial_load_path=path)
    assert fresh.manager.load() == 0
    assert equal(fresh.parameters(), source.parameters())
    assert fresh.data.seen == 0
    fresh.manager.close()

    going_on = Run(tmp_path / "all", initial_load_path=path, initial_load_model_only=False)
    assert going_on.until(6) == 4
    assert going_on.data.seen == 6
    later = Run(tmp_path / "all", initial_load_path=str(tmp_path / "nowhere"))
    assert later.until(6) == 6


def test_a_model_only_last_step_is_in_the_export_dtype(tmp_path: Path) -> None:
    """Only floating-point tensors are converted. The checkpoint holds the model and nothing
    else."""
    run = Run(tmp_path, last_save_model_only=True, export_dtype="bfloat16")
    run.model.register_buffer("count", torch.tensor([3]))
    run.until(3)
    last = holdfast.open(tmp_path / "step-3")
    assert set(last.names()) == set(run.model.state_dict())
    assert last.read("count").dtype == torch.int64
    weight = run.model.state_dict()["0.weight"]
    assert torch.equal(last.read("0.weight"), weight.bfloat16())
    assert run.manager.final_step() == 3


def test_a_run_resumes_from_the_newest_full_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G4: the model-only step 3 is passed over, and the log says so."""
    Run(tmp_path, last_save_model_only=True).until(3)
    with caplog.at_level(logging.WARNING, "holdfast"):
        assert Run(tmp_path).until(6) == 2
    assert "passed over step 3: it holds the model alone" in caplog.text


def test_a_folder_without_a_resumable_step_raises_an_error(tmp_path: Path) -> None:
    """G4: a run never silently starts over while there are checkpoints."""
    Run(tmp_path, last_save_model_only=True, interval=100).until(3)
    with pytest.raises(holdfast.NotFoundError, match="step 3: it holds the model alone"):
        Run(tmp_path).until(6)


def test_a_full_checkpoint_of_step_0_resumes_all_components(tmp_path: Path) -> None:
    """G9. Method: a loop that counts from 0."""
    first = Run(tmp_path)
    first.data.seen = 77
    first.manager.save(0, last_step=True)
    first.manager.close()
    run = Run(tmp_path)
    assert run.manager.load() == 0
    assert equal(run.parameters(), first.parameters())
    assert run.data.seen == 77


def test_only_the_model_is_loaded_from_a_seed(tmp_path: Path) -> None:
    seed = Run(tmp_path)
    seed.data.seen = 77
    seed.manager.save_seed()
    seed.manager.close()
    run = Run(tmp_path)
    assert run.manager.load() == 0
    assert equal(run.parameters(), seed.parameters())
    assert run.data.seen == 0


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    """G6: the error lists every mismatched tensor of model and optimizer."""
    Run(tmp_path).until(2)
    other = Run(tmp_path, width=5)
    before = other.parameters()
    with pytest.raises(holdfast.MismatchError) as caught:
        other.until(4)
    message = str(caught.value)
    for name in ("0.weight", "0.bias", "2.weight"):
        assert f"`{name}` has shape " in message
    assert "[6, 6] in the checkpoint, expected [5, 5]" in message
    assert "is it a checkpoint of another model?" in message
    assert equal(other.parameters(), before)
    assert not other.optimizer.state


def test_the_error_about_another_programs_loader_state_names_the_key_that_excludes_it(
    tmp_path: Path,
) -> None:
    """G6. Method: the loader state has another program's entries; then the run starts again as the
    hint says."""
    written = Run(tmp_path)
    written.data.state_dict = lambda: {"_snapshot": {"position": 3}}  # type: ignore[method-assign]
    written.until(2)
    with pytest.raises(holdfast.MismatchError) as caught:
        Run(tmp_path).until(4)
    assert "--checkpoint.exclude_from_loading dataloader" in str(caught.value.hint)
    resumed = Run(tmp_path, exclude_from_loading=("dataloader",))
    assert resumed.until(4) == 2
    assert resumed.data.seen == 2


def test_the_next_start_cleans_up_after_a_killed_run(tmp_path: Path) -> None:
    """G1: attempts and half-deleted checkpoints are deleted; one that was being replaced is
    restored."""
    Run(tmp_path).until(4)
    (tmp_path / ".attempt-6-0123abcd").mkdir()
    (tmp_path / ".attempt-step-6-0123abcd").mkdir()
    (tmp_path / "step-2").rename(tmp_path / ".removing-step-2-0123abcd")
    (tmp_path / "step-4").rename(tmp_path / ".replaced-step-4-0123abcd")
    run = Run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-4"}
    assert run.until(4) == 4


def test_the_seconds_for_which_saves_block_are_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.manager.blocked_s == 0
    run.until(2)
    assert run.manager.blocked_s > 0


def test_tied_weights_are_stored_once_and_found_under_both_names(tmp_path: Path) -> None:
    embed, head = nn.Embedding(400, 50), nn.Linear(50, 400, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "head": head})
    holdfast.save(tmp_path / "tied", {"model": model})
    checkpoint = holdfast.open(tmp_path / "tied")
    assert checkpoint.manifest.nbytes < 1.2 * 400 * 50 * 4
    for name in ("model.embed.weight", "model.head.weight"):
        assert torch.equal(checkpoint.read(name), embed.weight.detach())


def test_the_automatic_interval_follows_the_measured_durations(tmp_path: Path) -> None:
    """Method: failures so rare, or so frequent, that the optimum is outside of the bounds on
    any machine. Before the first save, the shortest interval is used."""
    bounds: dict[str, Any] = {"interval": "auto", "min_interval": 2, "max_interval": 5}
    Run(tmp_path / "rare", **bounds, mtbf_hours=1e12).until(13)
    assert steps(tmp_path / "rare") == [2, 7, 12, 13]
    Run(tmp_path / "frequent", **bounds, mtbf_hours=1e-12).until(7)
    assert steps(tmp_path / "frequent") == [2, 4, 6, 7]
