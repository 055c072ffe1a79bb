"""Errors of the user's objects name the object, its class and the line, on every rank."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import (
    CheckpointConfig,
    CheckpointManager,
    HoldfastError,
    MismatchError,
    StorageError,
    UsageError,
)
from holdfast.comm import Ranks, capture
from holdfast.spelling import spelled_bytes
from holdfast.state.stateful import hand_over
from holdfast.testing.ranks import try_ranks


class Broken:
    """`Stateful` of a user that raises in the chosen method."""

    def __init__(self, where: str = "", error: Exception | None = None) -> None:
        self.where, self.error = where, error or ValueError("no shadow\nfor `w`")

    def state_dict(self) -> dict[str, Any]:
        if self.where == "state_dict":
            raise self.error
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002
        if self.where == "load_state_dict":
            raise self.error


class BrokenModule(nn.Linear):
    """Module whose hook torch calls when Holdfast asks for the state dict."""

    def get_extra_state(self) -> Any:
        raise KeyError("scale")

    def set_extra_state(self, state: Any) -> None: ...


def raising() -> dict[str, float]:
    raise ZeroDivisionError("no samples")


def unreadable() -> dict[str, float]:
    return {"loss": float(Path("none").read_text())}


def manager(folder: Path, state: Broken, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=1, last_save_model_only=False, **settings)
    return CheckpointManager(folder, model=nn.Linear(2, 2), states={"ema": state}, config=config)


def failed(call: Callable[[], object]) -> HoldfastError:
    """The HoldfastError that a call raises."""
    with pytest.raises(HoldfastError) as raised:
        call()
    error = raised.value
    assert "unexpected" not in str(error)
    assert "Traceback" not in str(error)
    # Errors are pickled to be sent to other ranks.
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def save(folder: Path, state: Broken, **settings: Any) -> None:
    with manager(folder, state, **settings) as held:
        held.save(1)


def load(folder: Path) -> None:
    save(folder, Broken())
    with manager(folder, Broken("load_state_dict")) as held:
        held.load()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda f: save(f, Broken("state_dict")),
            "`Broken.state_dict` raised ValueError: no shadow",
        ),
        (
            load,
            "`ema` could not be loaded: `Broken.load_state_dict` raised ValueError: no shadow\nfor",
        ),
        (
            lambda f: save(f, Broken("state_dict"), async_mode="async"),
            "`Broken.state_dict` raised ValueError: no shadow",
        ),
        (
            lambda f: holdfast.save(f / "x", {"model": BrokenModule(1, 1)}),
            "`BrokenModule.get_extra_state` raised KeyError: 'scale' (",
        ),
        (
            lambda f: manager(f, Broken()).save(1, metrics=raising),
            "`raising` raised ZeroDivisionError: no samples (",
        ),
        (
            lambda f: manager(f, Broken()).save(1, metrics=unreadable),
            "`unreadable` raised FileNotFoundError: [Errno 2] No such file or directory: 'none' (",
        ),
        (
            lambda f: save(f, Broken("state_dict", FileNotFoundError(2, "gone", "a.bin"))),
            "`Broken.state_dict` raised FileNotFoundError: [Errno 2] gone: 'a.bin' (",
        ),
        (
            lambda f: save(f, Broken("state_dict", RuntimeError("x" * 10_000))),
            "`Broken.state_dict` raised RuntimeError: xxx",
        ),
        (
            lambda f: save(f, Broken("state_dict", ValueError())),
            "`Broken.state_dict` raised ValueError (",
        ),
    ],
)
def test_an_error_of_a_users_object_names_object_method_and_line(
    tmp_path: Path, call: Callable[[Path], object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """G7. Method: methods and functions of a user raise, called in every way; their error is the
    cause, and the stack is logged."""
    with caplog.at_level(logging.DEBUG, "holdfast"):
        error = failed(lambda: call(tmp_path))
    assert isinstance(error, UsageError | MismatchError)
    assert error.what.startswith(said)
    assert "test_saving_failures.py, line " in error.what
    assert len(error.what) < 3000
    assert error.__cause__ is not None
    assert type(error.__cause__).__name__ in error.what
    assert error.__cause__.__traceback__ is not None
    assert "Traceback" in caplog.text


def test_an_error_of_one_ranks_object_is_raised_on_all_ranks(
    tmp_path: Path,
) -> None:
    """G7. Method: two ranks as threads; the object of the second raises. That rank keeps the
    cause."""

    def work(ranks: Ranks) -> None:
        state = Broken("state_dict" if ranks.rank else "")
        config = CheckpointConfig(enable=True, interval=1)
        CheckpointManager(
            tmp_path, model=nn.Linear(1, 1), states={"ema": state}, config=config, ranks=ranks
        ).save(1)

    first, second = try_ranks(2, work)
    assert isinstance(first, UsageError)
    assert isinstance(second, UsageError)
    for error in (first, second):
        assert error.what.startswith("rank 1: `Broken.state_dict` raised ValueError: no shadow")
    assert first.__cause__ is None
    assert isinstance(second.__cause__, ValueError)
    assert not [*tmp_path.glob("step-*")]


def test_a_bug_in_holdfast_names_the_line_and_asks_for_a_report() -> None:
    """Method: a function of Holdfast called with wrong arguments."""
    found = capture(partial(spelled_bytes, "many"))  # type: ignore[arg-type]
    assert type(found) is HoldfastError
    assert found.what.startswith("Holdfast failed with TypeError: ")
    assert "spelling.py, line " in found.what
    assert found.what.endswith("in `spelled_bytes`)")
    assert "report it with the stack" in str(found.hint)


def test_an_error_of_an_installed_package_names_the_object() -> None:
    """Method: a scheduler of torch gets a state without the keys it needs."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    found = capture(partial(hand_over, scheduler, {}, "lr_scheduler"))
    assert isinstance(found, MismatchError)
    assert "`LambdaLR.load_state_dict` raised KeyError: 'lr_lambdas' (" in found.what
    assert "lr_scheduler.py, line " in found.what


def test_a_function_with_another_signature_is_named(tmp_path: Path) -> None:
    """Method: a metrics function that requires the step; a `state_dict` that requires an epoch."""
    wants: Any = lambda step: {"loss": step}  # noqa: E731 - as users write it
    error = failed(lambda: manager(tmp_path / "a", Broken()).save(1, metrics=wants))
    assert "does not take the arguments that Holdfast passes" in error.what
    assert "missing 1 required positional argument: 'step'" in error.what

    class Epochs(Broken):
        def state_dict(self, epoch: int) -> dict[str, Any]:  # type: ignore[override]
            return {"epoch": epoch}

    error = failed(lambda: save(tmp_path / "b", Epochs()))
    assert "Epochs.state_dict` does not take the arguments" in error.what
    assert isinstance(error, UsageError)


def test_an_object_that_raises_when_it_is_pickled_cannot_be_saved(tmp_path: Path) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    error = failed(lambda: holdfast.save(tmp_path / "x", {"a": {"b": Stubborn()}}))
    assert "`a.b` is a " in error.what
    assert "Stubborn, which a load could rebuild only by running code" in error.what


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["self"] = state
    error = failed(lambda: holdfast.save(tmp_path / "x", state))
    assert "contains itself" in str(error.hint)
    assert not (tmp_path / "x").exists()


def test_an_error_of_the_store_is_not_taken_for_one_of_the_user() -> None:
    """Method: an OSError raised outside the user's code."""
    found = capture(partial(os.listdir, "/no such folder"))
    assert isinstance(found, StorageError)
    assert isinstance(found.__cause__, FileNotFoundError)
