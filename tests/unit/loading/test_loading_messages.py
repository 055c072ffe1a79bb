"""Errors of a load say what is wrong, what has changed, and what to do next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.errors import DamagedError, MismatchError, NotFoundError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """G8. Method: a file of torch.save, for every function that loads or opens."""
    file, model = tmp_path / "w.pt", torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), file)
    config = CheckpointConfig(enable=True, initial_load_path=str(file))
    with CheckpointManager(tmp_path / "run", model=model, config=config) as manager:
        for load_it in (
            lambda: holdfast.load(file, model),
            lambda: holdfast.open(file),
            manager.load,
        ):
            with pytest.raises(NotFoundError, match=r"is a file, written by torch\.save") as raised:
                load_it()
            assert f"holdfast convert {file} " in str(raised.value.hint)
            assert "move it away" not in str(raised.value)


class Refusing:
    """Object that rejects its own state."""

    def state_dict(self) -> dict[str, int]:
        return {"version": 1}

    def load_state_dict(self, _: object) -> None:
        raise ValueError("version 1 is too old")


def test_an_error_after_tensors_have_changed_says_so(tmp_path: Path) -> None:
    """G6, G15. Method: an object rejects its state, in a load and in a manager, or a number is too
    large for a smaller float. Tensors have changed by then, and the error says so."""
    model, said = torch.nn.Linear(2, 2), r"; the state is loaded in part$"
    holdfast.save(tmp_path / "a", {"model": model, "object": Refusing()})
    holdfast.save(tmp_path / "b", {"model": model, "number": torch.tensor([1e30])})
    number = torch.zeros(1, dtype=torch.float16)
    for path, other in (("a", {"object": Refusing()}), ("b", {"number": number})):
        fresh = torch.nn.Linear(2, 2)
        with pytest.raises(MismatchError) as raised:
            holdfast.load(tmp_path / path, {"model": fresh, **other})
        assert re.search(said, raised.value.what)
        assert torch.equal(fresh.weight, model.weight) or number.isinf().all()
    config, states = CheckpointConfig(enable=True, interval=1), {"object": Refusing()}
    with CheckpointManager(tmp_path / "c", model=model, states=states, config=config) as manager:
        manager.save(1)
        with pytest.raises(MismatchError, match=r"`object` could not be loaded: .*") as raised:
            manager.load()
    assert re.search(said, raised.value.what)


def test_a_load_without_a_configuration_names_no_key(tmp_path: Path) -> None:
    """G8. Method: a load of a damaged checkpoint points to `verify`; a manager told to load it also
    says how to choose another."""
    model = torch.nn.Linear(2, 2)
    config = CheckpointConfig(enable=True, interval=1)
    with CheckpointManager(tmp_path, model=model, config=config) as manager:
        manager.save(1)
        (tmp_path / "step-1/__0_0.distcp").unlink()
        with pytest.raises(DamagedError) as raised:
            holdfast.load(tmp_path / "step-1", model)
        assert raised.value.hint == f"`holdfast verify {tmp_path}/step-1` lists what is damaged"
        with pytest.raises(DamagedError) as raised:
            manager.load(1)
        assert "holdfast verify" in str(raised.value.hint)
        assert "`load_step = -1`" in str(raised.value.hint)
        with pytest.raises(NotFoundError, match="steps there: 1; `load_step = -1`"):
            manager.load(2)
