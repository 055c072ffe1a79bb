"""Result of a resume: the step to continue from, and what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

Source = Literal["checkpoint", "seed", "initial", "nothing"]


class Resumed(int):
    """The step to continue from: an int with attributes that say where the state comes from."""

    source: Source
    """Origin of the loaded state. `checkpoint`: a full checkpoint of the run. `seed`: the model
    alone, from step 0 in the run's folder. `initial`: the checkpoint or weights that
    `initial_load_path` or `initial_load_in_hf` selects. `nothing`: nothing was loaded."""

    where: str | None
    """Path or URL of the checkpoint or weights that were loaded; None if nothing was loaded."""

    def __new__(cls, step: int, source: Source = "nothing", where: str | None = None) -> Self:
        resumed = super().__new__(cls, step)
        resumed.source, resumed.where = source, where
        return resumed

    @property
    def step(self) -> int:
        """The step as a plain int."""
        return int(self)

    if TYPE_CHECKING:

        def __add__(self, value: int, /) -> Any:
            """Return an int. Its type here is Any, so that type checkers accept `step += 1`."""

    def __getnewargs__(self) -> tuple[Any, ...]:
        return int(self), self.source, self.where

    def __str__(self) -> str:
        return str(int(self))

    def __repr__(self) -> str:
        return f"Resumed(step={int(self)}, source={self.source!r}, where={self.where!r})"
