"""The manager on several ranks, as threads."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import open_manifest
from holdfast.comm import Ranks
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import run_ranks, try_ranks


class Loader:
    """A data loader with another position on each rank."""

    def __init__(self, rank: int) -> None:
        self.at = 100 * rank

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "shuffle": [3, 1, 2]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at = state_dict["at"]


class GlobalLoader(Loader):
    """A data loader with the same position on each rank."""

    state_is_global: ClassVar = True

    def __init__(self, _rank: int) -> None:
        super().__init__(0)


def manager(folder: Path, ranks: Ranks, loader: Loader, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1, **settings)
    return CheckpointManager(
        folder, model=nn.Linear(2, 2), dataloader=loader, config=config, ranks=ranks
    )


def save(folder: Path, kind: type[Loader], step: int = 1) -> Any:
    def work(ranks: Ranks) -> None:
        loader = kind(ranks.rank)
        with manager(folder, ranks, loader) as held:
            loader.at += 7
            held.save(step)

    return work


def load(folder: Path, kind: type[Loader], **settings: Any) -> Any:
    def work(ranks: Ranks) -> int:
        loader = kind(ranks.rank)
        with manager(folder, ranks, loader, **settings) as held:
            assert held.load() == 1
        return loader.at

    return work


def flip(checkpoint: Path) -> None:
    """Change one byte of the tensor `weight`."""
    entry = open_manifest(LocalStore(checkpoint.parent), checkpoint.name).tensors["weight"]
    with (checkpoint / entry.chunks[0].file).open("r+b") as data:
        data.seek(entry.chunks[0].data_offset or 0)
        first = data.read(1)
        data.seek(-1, 1)
        data.write(bytes([first[0] ^ 1]))


def test_each_rank_gets_its_own_loader_state_back(tmp_path: Path) -> None:
    """G9: a loader with a state of its own on each rank, on the same number of ranks."""
    run_ranks(3, save(tmp_path, Loader))
    assert run_ranks(3, load(tmp_path, Loader)) == [7, 107, 207]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loader_states_of_ranks_do_not_fit_another_number_of_ranks(
    tmp_path: Path, size: int
) -> None:
    """G9: the error names the key to exclude, and with it excluded the rest resumes."""
    run_ranks(3, save(tmp_path, Loader))
    for error in try_ranks(size, load(tmp_path, Loader)):
        assert isinstance(error, holdfast.MismatchError)
        assert "saved by 3 ranks, one state for each; this run has" in str(error)
        assert 'exclude_from_loading = ["dataloader"]' in str(error)
    started = run_ranks(size, load(tmp_path, Loader, exclude_from_loading=("dataloader",)))
    assert started == [100 * rank for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_global_loader_state_fits_any_number_of_ranks(tmp_path: Path, size: int) -> None:
    """G9: it is stored once, and all ranks load it."""
    run_ranks(3, save(tmp_path, GlobalLoader))
    assert run_ranks(size, load(tmp_path, GlobalLoader)) == [7] * size


def test_ranks_that_read_for_each_other_fall_back_together(tmp_path: Path) -> None:
    """G4. Method: `load_replicas = "broadcast"`; one rank reads a flipped byte of the newest step,
    and all resume from the step before it, with its weights."""

    def save_two(ranks: Ranks) -> None:
        with manager(tmp_path, ranks, GlobalLoader(0)) as held:
            held.save(1)
            held.save(2)

    run_ranks(3, save_two)
    flip(tmp_path / "step-2")

    def load_one(ranks: Ranks) -> tuple[int | None, bytes]:
        with manager(tmp_path, ranks, GlobalLoader(0), load_replicas="broadcast") as held:
            step = held.load()
            weight = held._loader._components["model"].state_dict()["weight"]
        return step, weight.detach().numpy().tobytes()

    found = run_ranks(3, load_one)
    assert [step for step, _ in found] == [1, 1, 1]
    assert len({weight for _, weight in found}) == 1


def test_generators_that_start_afresh_are_logged_for_the_checkpoint_that_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G4, G9. Method: step 1 saved by one rank, step 2 by two and damaged; resumes on one rank, and
    on two."""
    for ranks, step in ((1, 1), (2, 2)):
        run_ranks(ranks, save(tmp_path, GlobalLoader, step))
    flip(tmp_path / "step-2")
    line = "random number generators start afresh: saved by 1 ranks, this run has 2"
    for ranks, expected in ((1, []), (2, [line])):
        caplog.clear()
        with caplog.at_level(logging.INFO, "holdfast"):
            run_ranks(ranks, load(tmp_path, GlobalLoader))
        said = [record.getMessage() for record in caplog.records]
        assert [text for text in said if "afresh" in text] == expected
        assert any("passed over step 2" in text for text in said)


def test_values_that_differ_between_ranks_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is dropped silently: state under one name that differs between ranks."""

    class Mine:
        def __init__(self, rank: int) -> None:
            self.state = {"seen": rank, "same": 5}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict

    weights = nn.Linear(2, 2)

    def work(ranks: Ranks) -> None:
        model, mine = copy.deepcopy(weights), Mine(ranks.rank)
        config = CheckpointConfig(enable=True, interval=1)
        with CheckpointManager(
            tmp_path, model=model, states={"mine": mine}, config=config, ranks=ranks
        ) as held:
            for step in (1, 2):
                held.save(step)

    with caplog.at_level(logging.WARNING, "holdfast"), torch.no_grad():
        run_ranks(2, work)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "differs between ranks" in line] == [
        "`mine.seen` differs between ranks 0 and 1: the version of the first rank that holds it is "
        "kept. State of one rank alone needs a key of its own, such as `rank_1`"
    ]
