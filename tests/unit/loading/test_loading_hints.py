"""A load whose state does not fit says which call fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.catalog.open_any import open_in
from holdfast.catalog.paths import open_parent
from holdfast.comm import Ranks
from holdfast.errors import MismatchError
from holdfast.loading.hints import hint_of_call
from holdfast.loading.load import load_tree
from holdfast.state.objects import StateTree
from holdfast.testing.ranks import try_ranks


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer after one step."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def model() -> nn.Module:
    """Return a model of other weights than `trained`."""
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """Return the path of a full checkpoint of a manager."""
    saved, optimizer = trained()
    config = holdfast.CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
    with holdfast.CheckpointManager(
        tmp_path / "run", model=saved, optimizers=optimizer, config=config
    ) as manager:
        manager.save(1)
    return tmp_path / "run/step-1"


def hint(path: Path, state: object, *, strict: bool = True) -> str:
    with pytest.raises(MismatchError) as raised:
        holdfast.load(path, state, strict=strict)
    return str(raised.value.hint)


def test_a_model_alone_is_loaded_from_a_full_checkpoint_as_the_hint_says(
    step: Path, model: nn.Module
) -> None:
    """Method: all differences are the entries of the optimizer and the random state; then the call
    of the hint."""
    found = hint(step, model)
    assert found == (
        "the checkpoint also has `optimizer`, `rng`: to load the model alone, "
        "`holdfast.load(path, model, strict=False)`"
    )
    holdfast.load(step, model, strict=False)
    assert torch.equal(model.get_parameter("0.weight"), holdfast.open(step).read("0.weight"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_in_a_dict_is_loaded_from_a_checkpoint_of_a_manager_as_the_hint_says(
    strict: bool, step: Path, model: nn.Module
) -> None:
    """Method: a manager stores the model's names without `model.`; then the call of the hint."""
    found = hint(step, {"model": model}, strict=strict)
    assert "the checkpoint has these entries without `model.`" in found
    assert "`holdfast.load(path, model, strict=False)`" in found
    holdfast.load(step, model, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_alone_is_loaded_from_below_a_key_as_the_hint_says(
    strict: bool, tmp_path: Path, model: nn.Module
) -> None:
    """Method: a checkpoint with the model below a key, then the call of the hint."""
    saved, optimizer = trained()
    holdfast.save(tmp_path / "one", {"net": saved, "optimizer": optimizer, "step": 1})
    found = hint(tmp_path / "one", model, strict=strict)
    expected = "the checkpoint has these entries below `net`: "
    assert found == expected + '`holdfast.load(path, {"net": model})`'
    holdfast.load(tmp_path / "one", {"net": model})


def test_a_checkpoint_of_another_model_is_suspected(step: Path) -> None:
    """Method: other names, another shape, and a model without the last layer."""
    for other in (
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 3)),
    ):
        assert hint(step, other).startswith("is it a checkpoint of another model?")


def test_every_rank_gets_the_hint(step: Path) -> None:
    """Method: two ranks, as stages of a pipeline, each with one layer of the model."""
    store, name = open_parent(step)
    source = open_in(store, name).source(store)

    def work(ranks: Ranks) -> None:
        number = str(ranks.rank)
        tree = StateTree({"model": nn.ModuleDict({number: nn.Linear(3, 3 - ranks.rank)})})
        load_tree(source, tree, ranks=ranks, hint_for=hint_of_call)

    for error in try_ranks(2, work):
        assert isinstance(error, MismatchError)
        assert "`model.1.bias` is not in the checkpoint" in error.what
        assert "the checkpoint has these entries without `model.`" in str(error.hint)
