"""Errors of the objects that people hand over: whose, which and where, on every rank."""

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
    """A `Stateful` of a user's that raises where it is told to."""

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
    """Torch calls the user's method, which Holdfast calls by way of it."""

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
    """The error that a call ends in, which is one for people."""
    with pytest.raises(HoldfastError) as raised:
        call()
    error = raised.value
    assert "unexpected" not in str(error)
    assert "Traceback" not in str(error)
    # Ranks hand it to each other by pickle.
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
def test_an_error_of_a_users_object_says_whose_and_which_and_where(
    tmp_path: Path, call: Callable[[Path], object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """G7. Method: methods and functions of a user's that raise, called in each way; the error they
    raised is the cause, and the stack is in the log."""
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


def test_an_error_of_one_ranks_object_is_told_to_all_and_its_cause_kept_where_it_is_known(
    tmp_path: Path,
) -> None:
    """G7. Method: two ranks as threads, the second's object raises."""

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


def test_a_fault_of_ours_says_where_and_what_to_report() -> None:
    """Method: a function of ours called as nobody should."""
    found = capture(partial(spelled_bytes, "many"))  # type: ignore[arg-type]
    assert type(found) is HoldfastError
    assert found.what.startswith("Holdfast failed with TypeError: ")
    assert "spelling.py, line " in found.what
    assert found.what.endswith("in `spelled_bytes`)")
    assert "report it with the stack" in str(found.hint)


def test_an_object_of_an_installed_package_is_named_too() -> None:
    """Method: a scheduler of torch's that is given a state without what it looks for."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    found = capture(partial(hand_over, scheduler, {}, "lr_scheduler"))
    assert isinstance(found, MismatchError)
    assert "`LambdaLR.load_state_dict` raised KeyError: 'lr_lambdas' (" in found.what
    assert "lr_scheduler.py, line " in found.what


def test_a_function_that_takes_other_arguments_is_named(tmp_path: Path) -> None:
    """Method: a function of metrics that wants the step; a `state_dict` that wants an epoch."""
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


def test_an_object_that_raises_when_it_is_pickled_cannot_be_kept(tmp_path: Path) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    error = failed(lambda: holdfast.save(tmp_path / "x", {"a": {"b": Stubborn()}}))
    assert "`a.b` is a " in error.what
    assert "Stubborn, which a load could rebuild only by running code" in error.what


def test_a_state_that_holds_itself_is_said_to_be_one(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["self"] = state
    error = failed(lambda: holdfast.save(tmp_path / "x", state))
    assert "contains itself" in str(error.hint)
    assert not (tmp_path / "x").exists()


def test_a_store_that_fails_is_still_a_store_that_fails() -> None:
    """Method: an OSError that comes from no code of a user's."""
    found = capture(partial(os.listdir, "/no such folder"))
    assert isinstance(found, StorageError)
    assert isinstance(found.__cause__, FileNotFoundError)
