"""`holdfast.testing.round_trip` on states that pass and on states that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.errors import UsageError
from holdfast.testing import round_trip


class Uncopied(torch.nn.Linear):
    def __deepcopy__(self, memo: object) -> Uncopied:
        raise AssertionError("no copies of this")


def test_a_state_that_survives_passes() -> None:
    round_trip({"model": torch.nn.Linear(2, 2), "notes": {1: [0.5, None], "epoch": 3}})


def test_differences_are_listed_with_the_mode() -> None:
    """Method: a buffer that the module's own `load_state_dict` changes."""

    class Shifts(torch.nn.Linear):
        def load_state_dict(
            self, state_dict: Any, strict: bool = True, assign: bool = False
        ) -> Any:
            return super().load_state_dict(
                {name: one + 1 for name, one in state_dict.items()}, strict, assign
            )

    with pytest.raises(AssertionError, match="mode `save`:\n  model"):
        round_trip({"model": Shifts(2, 2)})


def test_a_state_that_cannot_be_copied_needs_fresh() -> None:
    with pytest.raises(UsageError, match="no deep copy to load into: AssertionError: no copies"):
        round_trip({"model": Uncopied(2, 2)})
    round_trip({"model": Uncopied(2, 2)}, fresh={"model": Uncopied(2, 2)})
