"""Going on from a step of a folder: on all ranks, and from an older one where a step fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.comm import Ranks, run_on_rank_0
from holdfast.manager.resume import ResumableStep, newest_resumable, remember_damage, strict_step


@dataclass(frozen=True, slots=True)
class Resuming:
    """Ways for a run to go on from a step of its folder. Collective: every rank calls alike."""

    catalog: Catalog
    ranks: Ranks
    resume: Callable[[ResumableStep, bool], int]
    """`resume(found, explicit)` loads a step on all ranks, and returns its number; where one rank
    fails, all raise."""

    warn: Callable[[str], None]
    remember: bool
    """Whether a step that proves damaged is marked."""

    def from_step(self, step: int) -> int:
        """Go on from this step, or raise."""
        for _ in range(LOOKS_MAX - 1):
            found = run_on_rank_0(self.ranks, partial(strict_step, self.catalog, step))
            try:
                return self.resume(found, True)
            except UNREADABLE:
                if not self._was_replaced(found):
                    raise
        return self.resume(
            run_on_rank_0(self.ranks, partial(strict_step, self.catalog, step)), True
        )

    def from_newest(self) -> tuple[int | None, list[str]]:
        """Go on from the newest step that can be read. Returns it, None where there is none, and a
        line on each step that was passed over."""
        passed_over: list[str] = []
        below, looks = None, 0
        while True:
            found, refused = run_on_rank_0(
                self.ranks, partial(newest_resumable, self.catalog, below)
            )
            for line in [one for one in refused if one not in passed_over]:
                self.warn(f"passed over {line}")
                passed_over.append(line)
            if found is None:
                return None, passed_over
            try:
                return self.resume(found, False), passed_over
            except UNREADABLE as error:
                # Raised on every rank alike, so all go on to the same step.
                looks += 1
                if looks < LOOKS_MAX and self._was_replaced(found):
                    continue
                passed_over.append(f"step {found.step}: {error.what}")
                self.warn(f"passed over {passed_over[-1]}")
                if self.ranks.rank == 0 and self.remember:
                    remember_damage(self.catalog, found.step, error)
                below = found.step

    def _was_replaced(self, found: ResumableStep) -> bool:
        """Whether a step is gone, or another one than the one that was found."""

        def look() -> bool:
            return fingerprint(self.catalog.store, found.folder) != found.seen

        return run_on_rank_0(self.ranks, look)
