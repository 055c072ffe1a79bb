"""Arguments and settings are converted, or refused with what was expected and found."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch

from holdfast import CheckpointConfig, UsageError
from holdfast.arguments import (
    checked_flag,
    checked_path,
    flag,
    members,
    number,
    shown,
    whole_number,
)
from holdfast.format.names import STEP_MAX, checked_step, step_name, step_of
from holdfast.trainer.config import Config, ModelConfig, OptimizerConfig, TrainingConfig

SECTIONS = get_type_hints(Config).values()


class Opaque:
    def __repr__(self) -> str:
        raise RuntimeError("nobody asks for this")


NO_STEPS: list[Any] = [
    10.0,
    True,
    False,
    -1,
    10**18,
    2**63,
    10**19,
    10**5000,
    "7",
    None,
    float("nan"),
    [3],
    {},
    np.float64(3),
    np.bool_(True),
    np.array([3]),
    np.uint64(2**64 - 1),
    torch.tensor(3.0),
    torch.tensor(True),
    torch.tensor([1, 2]),
    torch.tensor(3, device="meta"),
    Opaque(),
]


@pytest.mark.parametrize("value", NO_STEPS, ids=lambda value: type(value).__name__)
def test_values_that_are_no_step_number_are_refused(value: Any) -> None:
    """Method: bools, floats, texts, negative and huge numbers, of Python, numpy and torch."""
    with pytest.raises(UsageError, match=r"`step` must be a whole number from 0 to 9{18}, found: "):
        checked_step(value, "step")


@pytest.mark.parametrize(
    "value", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7).byte()]
)
def test_integers_of_python_numpy_and_torch_are_steps(value: Any) -> None:
    assert checked_step(value, "step") == 7
    assert type(checked_step(value, "step")) is int


def test_readers_find_the_largest_step() -> None:
    """Method: the pattern of names matches the largest step, but not the next one."""
    assert step_of(step_name(STEP_MAX)) == STEP_MAX
    assert step_of(step_name(STEP_MAX + 1)) is None
    assert checked_step(STEP_MAX, "step") == STEP_MAX
    assert checked_step(-1, "step", least=-1) == -1


def test_numbers_and_bools_of_numpy_and_torch_are_converted() -> None:
    assert [whole_number(v) for v in (np.int8(3), torch.tensor(3), 3.0, True)] == [3, 3, None, None]
    floats = (np.float32(0.5), torch.tensor(0.5), 1, "1", True, 1j, torch.tensor(1j))
    assert [number(v) for v in floats] == [0.5, 0.5, 1.0, None, None, None, None]
    flags = (np.bool_(True), torch.tensor(False), True, 1, "yes", None)
    assert [flag(v) for v in flags] == [True, False, True, None, None, None]


def test_bools_and_paths_of_other_types_are_refused() -> None:
    values: list[Any] = [1, "no", None, [True]]
    for value in values:
        with pytest.raises(UsageError, match="`overwrite` must be True or False, found: "):
            checked_flag(value, "overwrite")
    assert checked_path(Path("a/b"), "path") == "a/b"
    values = [None, 3, b"a", {}, "", " ", "a\0b"]
    for value in values:
        with pytest.raises(UsageError, match="`path` must "):
            checked_path(value, "path")


def test_a_message_quotes_short_values_and_names_the_type_of_others() -> None:
    assert shown("x") == "'x'"
    assert shown((1, None)) == "(1, None)"
    assert shown([Opaque()]) == "a list"
    assert shown(Opaque()) == "an Opaque"
    assert shown(torch.tensor(1.0)) == "Tensor of torch.float32"
    assert len(shown("x" * 10_000)) < 100


WRONG: list[Any] = [
    object(),
    "no such value",
    1.5,
    True,
    float("nan"),
    float("inf"),
    None,
    [1],
    {"a": 1},
    b"x",
    -7,
    10**400,
    Path("a"),
    np.float32(0.5),
    torch.zeros(2),
]


def taken_as(section: Any, key: str, value: Any) -> Any:
    """Return the value of a setting after it was given `value`, or the error that refuses it."""
    try:
        return getattr(section(**{key: value}), key)
    except UsageError as error:
        return error


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_its_type_or_is_refused_by_name(section: Any) -> None:
    """Method: every key of every section with every wrong value; an accepted value has exactly the
    type of the key afterwards."""
    for key, hint in get_type_hints(section).items():
        for value in WRONG:
            result = taken_as(section, key, value)
            if isinstance(result, UsageError):
                assert key in result.what, result.what
                continue
            kinds = [get_args(one) for one in members(hint) if get_args(one)]
            choices = {choice for kind in kinds for choice in kind}
            fits = type(result) in members(hint) or result in choices
            assert fits or (result is None and type(None) in get_args(hint)), f"{key}: {result!r}"


@pytest.mark.parametrize(
    "given",
    [
        {"on_save_error": "Raise"},
        {"export_dtype": "int8"},
        {"export_dtype": torch.float32},
        {"async_mode": "asynk"},
        {"interval": "5"},
        {"interval": 5.0},
        {"interval": True},
        {"keep_latest_k": 2.5},
        {"enable": 1},
        {"mtbf_hours": "24"},
        {"stop_deadline_s": float("inf")},
        {"exclude_from_loading": "optimizer"},
        {"exclude_from_loading": ("optimizer", 5)},
        {"exclude_from_loading": {"optimizer"}},
        {"stop_signals": "SIGTERM"},
        {"folder": ""},
        {"folder": 5},
        {"initial_load_path": ""},
        {"load_step": 10**18},
        {"intervall": 5},
        {"save_optimizer": True},
    ],
)
def test_invalid_settings_are_refused_by_the_constructor(
    given: dict[str, Any],
) -> None:
    """Method: wrong choices, types and misspelt names; the error has key and value."""
    with pytest.raises(UsageError) as raised:
        CheckpointConfig(**given)
    assert next(iter(given)) in raised.value.what


def test_settings_are_converted_to_their_types() -> None:
    """Method: scalars of numpy and torch, a list, a path; by position, and by `replace`."""
    config = CheckpointConfig(
        enable=np.bool_(True),  # type: ignore[arg-type]
        interval=np.int64(5),  # type: ignore[arg-type]
        keep_latest_k=torch.tensor(3),  # type: ignore[arg-type]
        mtbf_hours=7,
        exclude_from_loading=["optimizer"],  # type: ignore[arg-type]
        folder=Path("a") / "b",  # type: ignore[arg-type]
    )
    expected = (True, 5, 3, 7.0, ("optimizer",), "a/b")
    converted = (
        config.enable,
        config.interval,
        config.keep_latest_k,
        config.mtbf_hours,
        config.exclude_from_loading,
        config.folder,
    )
    assert converted == expected
    assert [type(one) for one in converted] == [type(one) for one in expected]
    assert CheckpointConfig(True, "a/b", 5) == CheckpointConfig(
        enable=True, folder="a/b", interval=5
    )
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(UsageError, match=r"`checkpoint\.interval` must be .*, found: '7'"):
        dataclasses.replace(config, interval="7")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="multiple values"):
        CheckpointConfig(True, enable=True)  # type: ignore[misc]


def test_a_misspelt_name_or_choice_gets_a_suggestion() -> None:
    for kind, given, named in (
        (CheckpointConfig, {"intervall": 5}, "interval"),
        (CheckpointConfig, {"async_mode": "asynk"}, "async"),
        (ModelConfig, {"name": "llama"}, "llama3"),
        (TrainingConfig, {"stesp": 5}, "steps"),
    ):
        with pytest.raises(UsageError) as raised:
            kind(**given)
        assert f"`{named}`" in (raised.value.hint or "")


def test_the_sections_of_a_run_are_checked_by_their_constructors_too() -> None:
    for make in (
        lambda: TrainingConfig(steps="5"),  # type: ignore[arg-type]
        lambda: OptimizerConfig(betas=(0.9,)),  # type: ignore[arg-type]
        lambda: OptimizerConfig(lr=True),
        lambda: Config(checkpoint={"enable": True}),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=" must be "):
            make()
    assert OptimizerConfig(betas=[0.9, 0.5]).betas == (0.9, 0.5)  # type: ignore[arg-type]


def test_every_choice_of_every_setting_is_accepted() -> None:
    """Method: each member of each Literal, unless another setting forbids it."""
    for key, hint in get_type_hints(CheckpointConfig).items():
        for member in members(hint):
            for choice in get_args(member) if getattr(member, "__origin__", 0) is Literal else ():
                assert getattr(CheckpointConfig(**{key: choice}), key) == choice
