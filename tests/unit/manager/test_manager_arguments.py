"""What a manager is given: refused by name before its folder is touched, on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager, HoldfastError, UsageError
from holdfast.comm import Ranks, Solo
from holdfast.hf.export import HFModel
from holdfast.manager.arguments import numbers_in
from holdfast.testing.ranks import try_ranks


class Counter:
    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), 0.1)
SCHEDULER = torch.optim.lr_scheduler.LambdaLR(OPTIMIZER, lambda n: 1 / (n + 1))
LOADER: Any = torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]


class Named(nn.Module):
    """A model with a parameter of a given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(1)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"folder": None}, "`folder` must be a path"),
    ({"folder": 5}, "`folder` must be a path"),
    ({"folder": b"x"}, "`folder` must be a path"),
    ({"folder": ""}, "`folder` must name a folder"),
    ({"folder": MODEL}, "`folder` must be a path, .*, found: a Linear"),
    ({"model": None}, "`model` must be a torch.nn.Module, or a list of them, found: None"),
    ({"model": MODEL.state_dict()}, "`model` must be .*, found: an OrderedDict"),
    ({"model": nn.Linear}, "found: the class Linear\nhint: an instance of it"),
    ({"model": MODEL.parameters()}, "found: a generator\nhint: model=list"),
    ({"model": []}, "`model` must have at least one module"),
    ({"model": [MODEL, 3]}, "`model` must be .*, found: 3"),
    ({"model": "model"}, "`model` must be .*, found: 'model'"),
    ({"optimizers": None}, "`optimizers` must be .*, found: None\nhint: leave it out"),
    ({"optimizers": MODEL.parameters()}, "`optimizers` must be .*, found: a generator"),
    ({"optimizers": SCHEDULER}, "`optimizers` must be .*, found: a LambdaLR"),
    ({"optimizers": {"a": OPTIMIZER}}, "`optimizers` must be .*, found: a dict"),
    ({"lr_schedulers": lambda n: n}, "`lr_schedulers` must be .*, found: a function"),
    ({"lr_schedulers": OPTIMIZER}, "`lr_schedulers` must be .*, found: a SGD\nhint: pass"),
    ({"lr_schedulers": [OPTIMIZER]}, "`lr_schedulers` must be .*, found: a SGD\nhint: pass"),
    ({"dataloader": LOADER}, "`dataloader` must be .*, found: a DataLoader\nhint: .*Stateful"),
    ({"dataloader": Counter}, "`dataloader` must be .*, found: the class Counter"),
    ({"states": [Counter()]}, "`states` must be a dict of objects by name, found: a list"),
    ({"states": {3: Counter()}}, "`states` must have text as names, found: 3"),
    ({"states": {"": Counter()}}, "`states` must have text as names, found: ''"),
    ({"states": {"count": 5}}, r"`states\['count'\]` must be an object with .*, found: 5"),
    ({"states": {"count": None}}, r"`states\['count'\]` must be .*, found: None"),
    ({"states": {"rng": Counter()}}, "found: `rng`, which every step has"),
    ({"states": {"model": Counter()}}, "found: `model`, which `model` has"),
    ({"states": {"optimizer": Counter()}}, "found: `optimizer`, which `optimizers` has"),
    ({"states": {"weight": Counter()}}, "found: `weight`, which a tensor of the model has"),
    ({"states": {"data_loader": Counter()}}, "found: `data_loader`, which `dataloader` has"),
    ({"model": Named("rng")}, "`model` has a tensor `rng`, which is the name of a part"),
    ({"config": {"enable": True}}, r"found: a dict\nhint: CheckpointConfig\(\*\*config\)"),
    ({"config": {}}, "`config` must be a `CheckpointConfig`, found: a dict"),
    ({"config": True}, "`config` must be a `CheckpointConfig`, found: True"),
    ({"ranks": 4}, "`ranks` must be ranks as .*, found: 4"),
    ({"ranks": 0}, "`ranks` must be ranks as .*, found: 0"),
    ({"ranks": Solo}, "found: the class Solo"),
    ({"hub": {"model_type": "llama"}}, "`hub` must be a `HFModel`, found: a dict"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda one: next(iter(one), ""))
def test_an_argument_of_another_type_is_refused_and_nothing_is_touched(
    tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    """Method: each argument of the constructor, wrong in the ways that people get it wrong."""
    arguments: dict[str, Any] = {"folder": tmp_path / "run", "model": MODEL} | {
        "optimizers": OPTIMIZER
    }
    with pytest.raises(UsageError, match=said):
        CheckpointManager(**(arguments | given))
    assert not (tmp_path / "run").exists()


def test_a_part_that_nobody_gives_may_be_a_state(tmp_path: Path) -> None:
    """Method: a loader and an optimizer of another kind under the names that steps have for them,
    a dict and a tensor; all come back."""

    def manager(value: int) -> tuple[CheckpointManager, dict[str, Any]]:
        states: dict[str, Any] = {"optimizer": Counter(), "dataloader": Counter()}
        states |= {"counts": {"n": value, "list": [value]}, "mean": torch.full((2,), float(value))}
        states["optimizer"].seen = states["dataloader"].seen = value
        config = CheckpointConfig(enable=True, interval=1, async_mode="async_with_pinned_mem")
        return CheckpointManager(tmp_path, model=MODEL, states=states, config=config), states

    one, _ = manager(7)
    with one:
        one.save(1)
    two, states = manager(0)
    with two:
        assert two.load() == 1
    assert (states["optimizer"].seen, states["dataloader"].seen) == (7, 7)
    assert states["counts"] == {"n": 7, "list": [7]}
    assert torch.equal(states["mean"], torch.full((2,), 7.0))


def test_arguments_that_behave_like_torchs_own_are_taken(tmp_path: Path) -> None:
    """Method: an optimizer and a scheduler of another library, which have no class of torch's."""

    class Optimizer:
        def __init__(self) -> None:
            self.param_groups = OPTIMIZER.param_groups
            self.state = OPTIMIZER.state

        state_dict, load_state_dict = OPTIMIZER.state_dict, OPTIMIZER.load_state_dict

    given: dict[str, Any] = {"optimizers": Optimizer(), "lr_schedulers": (Counter(),)}
    with CheckpointManager(tmp_path, model=(MODEL,), **given) as manager:
        assert manager.save(1, last_step=True)
    pinned = CheckpointConfig(enable=True, async_mode="async_with_pinned_mem")
    with pytest.raises(UsageError, match="an Optimizer has no hook for"):
        CheckpointManager(tmp_path, model=MODEL, config=pinned, **given)


ALWAYS: Any = {"enable": True, "interval": 1, "on_save_error": "warn"}

NO_STEPS: list[Any] = [10.0, True, -5, 10**19, "7", None, np.float32(3), torch.tensor(True), [1]]


@pytest.mark.parametrize(
    "settings", [{}, {"enable": False}, {"load_only": True}, {"interval": 500}]
)
def test_what_is_no_step_is_refused_before_anything_is_written(
    tmp_path: Path, settings: Any
) -> None:
    """Method: every call that takes a step, whether it would save or not, and with errors
    turned into warnings."""
    config = CheckpointConfig(**(ALWAYS | settings))
    with CheckpointManager(tmp_path, model=MODEL, config=config) as manager:
        for value in NO_STEPS:
            with pytest.raises(UsageError, match="`step` must be a whole number from 0 to"):
                manager.save(value)
            if value is not None:
                with pytest.raises(UsageError, match="`step` must be a whole number from -1 to"):
                    manager.load(value)
        for last in (1, "yes", None, {"loss": 1.0}):
            with pytest.raises(UsageError, match="`last_step` must be True or False"):
                manager.save(1, last)  # type: ignore[arg-type]
        for measured in ([1.0], 3.0, "loss"):
            with pytest.raises(UsageError, match="`metrics` must be a dict of numbers, or"):
                manager.save(1, metrics=measured)  # type: ignore[arg-type]
    assert not [path for path in tmp_path.iterdir() if path.name != ".lock"]


def test_settings_that_have_no_effect_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: `enable` forgotten beside other settings; none given; all in effect."""
    given: list[tuple[dict[str, Any], bool]] = [
        ({"interval": 5, "keep_latest_k": 3}, True),
        ({}, False),
        ({"enable": True, "interval": 5}, False),
    ]
    for settings, said in given:
        caplog.clear()
        CheckpointManager(tmp_path, model=MODEL, config=CheckpointConfig(**settings)).close()
        assert ("without effect are interval, keep_latest_k" in caplog.text) == said
        assert bool(caplog.records) == said


def test_integers_and_flags_of_numpy_and_torch_are_steps_and_flags(tmp_path: Path) -> None:
    """Method: saved and loaded by them; the last by a comparison of numpy's."""
    config = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
    with CheckpointManager(tmp_path, model=MODEL, config=config) as manager:
        assert manager.save(np.int64(3))  # type: ignore[arg-type]
        assert manager.save(torch.tensor(4))  # type: ignore[arg-type]
        assert manager.save(np.int32(5), np.int32(5) == np.int32(5))  # type: ignore[arg-type]
    with CheckpointManager(tmp_path, model=MODEL, config=config) as manager:
        assert manager.load(np.int64(4)) == 4  # type: ignore[arg-type]
        assert manager.load(torch.tensor(-1)) == 5  # type: ignore[arg-type]
    assert holdfast.open(tmp_path / "step-3").manifest.step == 3


def errors_of(work: Callable[[Ranks], object], size: int = 2) -> list[str]:
    """The message that each rank ends in."""
    found = try_ranks(size, work, timeout_s=5)
    assert all(isinstance(one, HoldfastError) for one in found), found
    return [str(one) for one in found]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, r: m.save(1.0 if r else 1), "rank 1: `step` must be a whole number"),
        (lambda m, r: m.save(1, r), "rank 0: `last_step` must be True or False"),
        (lambda m, r: m.save(10 + r), "`step` must be the same on every rank, found: 10 to 11"),
        (lambda m, r: m.save(1, r == 1), "`last_step` must be the same on every rank"),
        (lambda m, r: m.save(1, metrics=[] if r else None), "rank 1: `metrics` must be"),
        (lambda m, r: m.load("1" if r else 1), "rank 1: `step` must be a whole number"),
    ],
)
def test_a_wrong_argument_of_one_rank_is_told_to_all(
    tmp_path: Path, call: Callable[[CheckpointManager, int], object], said: str
) -> None:
    """G7. Method: two ranks as threads, one of which is wrong, or other than the other."""

    def work(ranks: Ranks) -> None:
        config = CheckpointConfig(enable=True, interval=1)
        with CheckpointManager(tmp_path, model=nn.Linear(1, 1), config=config, ranks=ranks) as one:
            call(one, ranks.rank)

    assert all(said in message for message in errors_of(work))
    assert not [*tmp_path.glob("step-*")]


def test_a_wrong_argument_of_one_ranks_manager_is_told_to_all(tmp_path: Path) -> None:
    """G7. Method: a loader without state on rank 1 alone."""

    def work(ranks: Ranks) -> None:
        loader = LOADER if ranks.rank else Counter()
        CheckpointManager(tmp_path / "run", model=MODEL, dataloader=loader, ranks=ranks)

    assert all("rank 1: `dataloader` must be a loader" in one for one in errors_of(work))
    assert not (tmp_path / "run").exists()


def test_metrics_are_numbers_of_any_kind_or_refused_by_name() -> None:
    """Method: Python's, numpy's and torch's, of one element; then text, None, several elements."""
    given: Any = {"a": 1, "b": np.float32(0.5), "c": torch.tensor([2.0]), "d": True}
    assert numbers_in(given) == {"a": 1.0, "b": 0.5, "c": 2.0, "d": 1.0}
    assert numbers_in(lambda: given) == numbers_in(given)
    assert numbers_in(None) == {}
    for value in ("0.5", None, torch.ones(2), 1j, [1.0], 10**400):
        with pytest.raises(UsageError, match="`metrics` must have a number as `loss`, found: "):
            numbers_in({"loss": value})  # type: ignore[dict-item]
    for name in (3, None, "", "\ud800"):
        with pytest.raises(UsageError, match="`metrics` must have text as names, found: "):
            numbers_in({name: 1.0})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="`metrics` must be a function that returns a dict"):
        numbers_in(lambda: 0.5)  # type: ignore[arg-type]


def test_a_model_of_the_hub_is_what_its_config_json_says() -> None:
    """Method: a configuration object of transformers' kind, values that JSON has not, a path."""
    for config in (object(), "llama", None, [("a", 1)]):
        with pytest.raises(UsageError, match=r"`HFModel\.config` must be a dict"):
            HFModel(config)  # type: ignore[arg-type]
    for value in (torch.float32, float("nan"), {1, 2}, "\ud800"):
        with pytest.raises(UsageError, match=r"`HFModel\.config` must be plain JSON: "):
            HFModel({"torch_dtype": value})
    with pytest.raises(UsageError, match=r"`HFModel\.assets` must be a path"):
        HFModel({}, 5)  # type: ignore[arg-type]
    assert HFModel({"id2label": {0: "no"}}, Path("a")).assets == "a"  # type: ignore[arg-type]
