"""Requests of a bucket in memory that are cut, or are answered wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from buckets import CHANGES, Dead
from holdfast.storage.bucket import UnansweredError

Mode = Literal["before", "after", "failed", "lost"]
"""Fault at one request.

* `before`, `after`: the process dies before or after the request;
* `failed`: the store does not execute it, and the process gets an error;
* `lost`: the store executes it, and the process gets an error, since the answer is lost.
"""

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass
class Cut:
    """Disturbs the request of this number."""

    at: int
    mode: Mode
    only: tuple[str, ...] = CHANGES
    """Verbs of the requests that are counted."""

    count: int = 0
    done: bool = False
    request: str = ""

    def __call__(self, verb: str, key: str, when: str) -> None:
        if self.done and self.mode in ("before", "after"):
            raise Dead(self.request)
        if verb not in self.only:
            return
        wanted = "before" if self.mode in ("before", "failed") else "after"
        if when == wanted:
            self.count += 1
            if self.count > self.at and not self.done:
                self.done, self.request = True, f"{verb} {key}"
                if self.mode in ("before", "after"):
                    raise Dead(self.request)
                raise UnansweredError(f"no answer: {self.request}")

    def __str__(self) -> str:
        return f"request {self.at}, {self.mode}: {self.request}"
