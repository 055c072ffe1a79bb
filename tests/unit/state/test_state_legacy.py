"""Checkpoints without structure: those of stock DCP and of old versions of Holdfast."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.errors import MismatchError
from holdfast.loading.load import load_tree
from holdfast.state.objects import StateTree
from holdfast.state.same import differences
from holdfast.storage.local import LocalStore
from kept import Kept

dcp: Any = import_module("torch.distributed.checkpoint")


def stored(kind: str, folder: Path, state: dict[str, Any]) -> Source:
    """Save as stock DCP does, with and without paths, or as old versions of Holdfast did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "before":
            holdfast.save(folder / "one", {key: Kept(value) for key, value in state.items()})
        else:
            dcp.save(state, checkpoint_id=folder / "one")
    manifest = replace(holdfast.open(folder / "one").manifest, structure=None)
    if kind == "pathless":
        manifest = replace(
            manifest,
            tensors={n: e._replace(path=(n,)) for n, e in manifest.tensors.items()},
            values={n: replace(e, path=(n,)) for n, e in manifest.values.items()},
        )
    return Source(LocalStore(folder), "one", manifest)


KINDS = ["stock", "pathless", "before"]


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_empty_containers_come_from_a_fresh_object(kind: str, tmp_path: Path) -> None:
    """G10, G15. Method: numbers as keys, ordered dicts, and dicts without values in lists, which
    stock DCP leaves out; nothing in them is lost."""
    saved = {
        "milestones": Counter({30: 1, 80: 2}),
        "order": OrderedDict([("b", 1), ("a", torch.ones(2))]),
        "lambdas": [{}],
        "nothing": {"x": {}},
        "plain": {"deep": {"count": 5, "list": [1, 2]}},
        "rows": [torch.ones(1), {"x": 2}],
    }
    fresh = {
        "milestones": Counter({30: 0, 80: 0}),
        "order": OrderedDict([("b", 0), ("a", torch.zeros(2))]),
        "lambdas": [{}],
        "nothing": {"x": {}},
        "plain": {"deep": {"count": 0, "list": []}},
        "rows": [torch.zeros(1), {"x": 0}],
    }
    source = stored(kind, tmp_path, {"a": saved})
    one = Kept(fresh)
    load_tree(source, StateTree({"a": one}), ranks=Solo())
    assert [*differences(saved, one.state)] == []


@pytest.mark.parametrize("kind", ["stock", "before"])
def test_containers_that_grew_are_restored_if_paths_are_stored(kind: str, tmp_path: Path) -> None:
    """G15. Method: lists and dicts that are empty in a fresh object, None that became a dict."""
    saved = {"rows": [{"i": 1}, {"i": 2}], "last": {"epoch": 4}, "none": None, "by": {3: 1, 4: 2}}
    source = stored(kind, tmp_path, {"a": saved})
    one = Kept({"rows": [], "last": None, "none": {"was": 1}, "by": {3: 0}})
    load_tree(source, StateTree({"a": one}), ranks=Solo())
    assert [*differences(saved, one.state)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_missing_entries_are_listed_and_nothing_changes(kind: str, tmp_path: Path) -> None:
    """G6. Method: entries of a fresh object that the checkpoint lacks; no entries at all."""
    source = stored(kind, tmp_path, {"a": {"x": 1, "d": {"y": torch.ones(1)}}})
    one = Kept({"x": 0, "d": {"y": torch.zeros(1), "z": 3}, "w": None})
    with pytest.raises(MismatchError) as refused:
        load_tree(source, StateTree({"a": one, "b": Kept({"q": 1})}), ranks=Solo())
    for name in ("a.d.z", "a.w", "b.q"):
        assert f"`{name}` is not in the checkpoint" in refused.value.what
    assert one.state["x"] == 0


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, Warm()),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.ConstantLR(o),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            ],
            [2],
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
def test_schedulers_load_their_state_from_stock_dcp(
    scheduler: Any, kind: str, tmp_path: Path
) -> None:
    """G10. Method: torch's own; functions and objects as lambdas, of which stock stores nothing."""
    layer = nn.Linear(1, 1)

    def made() -> Any:
        return scheduler(torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9))

    one, two = made(), made()
    for _ in range(3):
        one.step(*([1.0] if "Plateau" in type(one).__name__ else []))
    source = stored(kind, tmp_path, {"lr_scheduler": one.state_dict()})
    load_tree(source, StateTree({"lr_scheduler": two}), ranks=Solo())
    assert two.last_epoch == 3
    assert two.state_dict()["_last_lr"] == one.state_dict()["_last_lr"]


class Warm:
    """A factor with state."""

    def __call__(self, _: int) -> float:
        return 1.0


def test_a_checkpoint_of_torchtitan_without_lambdas_loads(tmp_path: Path) -> None:
    """G10. Method: names as TorchTitan 0.3 writes them: the model at the top level, the optimizer
    by parameter name, a scheduler without its `lr_lambdas`; a manager resumes from it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Warm())
    loss: Any = model(torch.ones(1, 2)).sum()
    loss.backward()
    optimizer.step()
    scheduler.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {
        **model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=flat),
        "lr_scheduler": scheduler.state_dict(),
        "train_state": Kept({"step": torch.tensor(7)}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "step-7")
    names = holdfast.open(tmp_path / "step-7").names()
    assert not [name for name in names if "lr_lambdas" in name]
    fresh = nn.Linear(2, 2)
    again = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(again, Warm())
    counters = Kept({"step": torch.tensor(0)})
    config = holdfast.CheckpointConfig(enable=True, stop_signals=())
    with holdfast.CheckpointManager(
        tmp_path,
        model=fresh,
        optimizers=again,
        lr_schedulers=schedule,
        states={"train_state": counters},
        config=config,
    ) as manager:
        assert manager.load() == 7
    assert torch.equal(fresh.weight, model.weight)
    assert schedule.last_epoch == scheduler.last_epoch
    assert counters.state["step"] == 7
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
