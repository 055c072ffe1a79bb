"""A mistake on one rank of a real process group raises the same message on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast import CheckpointConfig, CheckpointManager, UsageError
from processes import run_processes


class Broken:
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("no shadow")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def message(call: Any) -> tuple[str, str | None]:
    """Return the message of the error that a call raises, and the type of its cause."""
    with pytest.raises(UsageError) as raised:
        call()
    cause = raised.value.__cause__
    return raised.value.what, None if cause is None else type(cause).__name__


def mistakes(rank: int, size: int, folder: Path) -> list[tuple[str, str | None]]:
    state = {"w": torch.ones(2), "own": Broken() if rank == 1 else None}
    found = [
        message(lambda: holdfast.save(folder / "a", {"w": torch.ones(2)}, overwrite=rank)),  # type: ignore[arg-type]
        message(lambda: holdfast.load(7 if rank else folder, {})),  # type: ignore[arg-type]
        message(lambda: holdfast.save(folder / "a", state)),
    ]
    config = CheckpointConfig(enable=True, interval=1)
    with CheckpointManager(folder / "run", model=nn.Linear(1, 1), config=config) as manager:
        found.append(message(lambda: manager.save(float(rank) if rank else 1)))  # type: ignore[arg-type]
        assert manager.save(2)
    return found


def test_a_mistake_of_one_rank_is_raised_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    """G7. Method: one of two processes on gloo passes wrong arguments, or an object that raises."""
    first, second = run_processes(2, mistakes, tmp_path)
    assert [what for what, _ in first] == [what for what, _ in second]
    said = [what for what, _ in first]
    assert said[0].startswith("rank 0: `overwrite` must be True or False, found: 0")
    assert said[1].startswith("rank 1: `path` must be a path")
    assert said[2].startswith("rank 1: `Broken.state_dict` raised ValueError: no shadow (")
    assert said[3].startswith("rank 1: `step` must be a whole number")
    assert [cause for _, cause in first] == [None] * 4
    assert [cause for _, cause in second] == [None, None, "ValueError", None]
    assert [path.name for path in tmp_path.glob("*/step-*")] == ["step-2"]
