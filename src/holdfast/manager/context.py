"""Context that the loader and the saver of a run share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.goodput import Goodput

OnSaved = Callable[[int, str, Mapping[str, float]], object]
"""Function that is called with the step, path and metrics of each checkpoint once it is durable."""

logger: logging.Logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class RunContext:
    """The checkpoints (`catalog`), settings and ranks of a run."""

    catalog: Catalog
    config: CheckpointConfig
    ranks: Ranks
    others: Sequence[str] = ()
    """Names of all components but the model."""

    goodput: Goodput = field(default_factory=Goodput)
    on_saved: OnSaved | None = None

    def note_saved(self, step: int, where: str, metrics: Mapping[str, float]) -> None:
        """Call the user's function `on_saved`, if there is one, on rank 0. Log its errors, since
        they do not harm the checkpoint. `where`: path or URL of the checkpoint."""
        if self.on_saved is None or self.ranks.rank:
            return
        try:
            self.on_saved(step, where, metrics)
        except Exception:
            logger.exception("step %d is saved, but `on_saved` failed", step)

    @property
    def saves(self) -> bool:
        """Whether the run saves to its folder."""
        return self.config.enable and not self.config.load_only

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes per second that each rank may write to the run folder; None for no limit."""
        return self.config.write_bandwidth_limit * 1e6 / self.ranks.size or None

    def info(self, line: str) -> None:
        """Log a line on rank 0."""
        if self.ranks.rank == 0:
            logger.info(line)

    def warn(self, *lines: str) -> None:
        """Log warnings on rank 0."""
        for line in lines if self.ranks.rank == 0 else ():
            logger.warning(line)
