"""The manifest names the components of a checkpoint, and every tool uses these names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager, MismatchError
from holdfast.catalog.findings import components_of
from holdfast.cli.main import main


class Counter:
    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def manager(
    folder: Path, *, extras: bool, built: nn.Module | None = None, **settings: Any
) -> CheckpointManager:
    """A run; with `extras` it also has an average of the weights, a counter and a loader."""
    built = model() if built is None else built
    given: dict[str, Any] = {"states": {"ema": model(), "counter": Counter()}}
    given["dataloader"] = Counter()
    optimizer = torch.optim.SGD(built.parameters(), 0.1)
    config = CheckpointConfig(**({"enable": True, "interval": 1} | settings))
    return CheckpointManager(
        folder, model=built, optimizers=optimizer, config=config, **(given if extras else {})
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a seed, a full checkpoint, and a last one that holds the model alone."""
    folder = tmp_path_factory.mktemp("run")
    with manager(folder, extras=True) as one:
        one.save_seed()
        one.save(1)
        one.save(2, last_step=True)
    return folder


WEIGHTS = {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_manifest_names_the_components_other_than_the_model(run: Path) -> None:
    """Method: the manifest of a full checkpoint, and of one that holds the model alone."""
    full, last = (holdfast.open(run / name).manifest for name in ("step-1", "step-2"))
    expected = {"counter", "dataloader", "ema", "lr_scheduler", "optimizer", "rng"}
    assert {*(full.components or ())} == expected
    assert last.components == ()
    assert {name for name, part in components_of(full).items() if part == "model"} == WEIGHTS
    assert {*components_of(last).values()} == {"model"}


def cli(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_no_tool_counts_states_as_part_of_the_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: an average of the weights as a state is counted separately, and left out by
    `--model-only`. The same holds for a conversion of a conversion, which can be resumed from if
    its source can."""
    parts = json.loads(cli(capsys, "show", run / "step-1", "--json"))["parts"]
    assert parts["model"]["elements"] == parts["ema"]["elements"] == 3 * 3 + 3 + 3 * 2 + 2
    assert ", step 1, full, " in cli(capsys, "show", run / "step-1")
    cli(capsys, "convert", run / "step-1", tmp_path / "weights.pt", "--model-only")
    assert torch.load(tmp_path / "weights.pt").keys() == WEIGHTS
    cli(capsys, "convert", run / "step-1", tmp_path / "copy/step-1")
    cli(capsys, "convert", run / "step-1", tmp_path / "copy/step-2", "--model-only")
    cli(capsys, "convert", tmp_path / "copy/step-1", tmp_path / "again.pt", "--model-only")
    assert torch.load(tmp_path / "again.pt").keys() == WEIGHTS
    listed = json.loads(cli(capsys, "list", tmp_path / "copy", "--json"))
    # Plain SGD keeps no tensors: a checkpoint with nothing but values beside the model is full too.
    assert [one["kind"] for one in listed["checkpoints"]] == ["full", "model"]
    assert listed["resume"] == 1
    copies = [holdfast.open(tmp_path / "copy" / name) for name in ("step-1", "step-2")]
    assert {*copies[0].names()} == {*holdfast.open(run / "step-1").names()}
    assert {*copies[1].names()} == WEIGHTS
    assert copies[1].manifest.components == ()
    assert "equal: 4 tensors" in cli(
        capsys, "diff", run / "step-1", tmp_path / "weights.pt", "--model-only"
    )


def test_a_manifest_without_components_is_divided_by_names(tmp_path: Path) -> None:
    """Method: as `holdfast.save` and earlier managers wrote it."""
    state = {"w": torch.ones(2), "ema": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}}
    holdfast.save(tmp_path / "x", state)
    manifest = holdfast.open(tmp_path / "x").manifest
    assert manifest.components is None
    assert components_of(manifest) == {"w": "model", "ema.w": "model", "optimizer.m": "optimizer"}


def test_a_run_starts_from_the_model_of_a_run_with_other_components(
    run: Path, tmp_path: Path
) -> None:
    """Method: weights from a full checkpoint and from a seed, into a run without states. Loading
    all of it is still refused, and excluded components are ignored."""
    expected = holdfast.open(run / "step-1").read("0.weight")
    built = model()
    path = str(run / "step-1")
    with manager(tmp_path / "a", extras=False, built=built, initial_load_path=path) as one:
        assert one.load() == 0
    assert torch.equal(built.state_dict()["0.weight"], expected)
    with manager(run, extras=False, built=built, load_only=True) as one:
        assert one.load(0) == 0
        with pytest.raises(MismatchError, match=r"`ema\.0\.weight` is in the checkpoint, but not"):
            one.load(1)
    loader = ("data_loader", "lr_scheduler")
    with manager(run, extras=True, load_only=True, exclude_from_loading=loader) as one:
        assert one.load(1) == 1


def test_the_state_of_a_removed_loader_can_be_excluded(tmp_path: Path) -> None:
    """Method: saved with a loader, resumed without one, as the hint of the error says."""
    given: dict[str, Any] = {"enable": True, "interval": 1, "last_save_model_only": False}
    for settings, loader in (
        (given, Counter()),
        (given | {"exclude_from_loading": ("dataloader",)}, None),
    ):
        config = CheckpointConfig(**settings)
        one = CheckpointManager(tmp_path, model=model(), dataloader=loader, config=config)
        with one:
            if loader is None:
                assert one.load() == 1
            else:
                one.save(1)
