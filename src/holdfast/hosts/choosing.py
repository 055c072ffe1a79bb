"""Choose the checkpoint that all ranks load, even if each host has a folder of its own."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.catalog.findings import raise_unreadable, summary_of
from holdfast.catalog.newest import check, newest_good
from holdfast.comm import Ranks, gather_and_run, run_on_all
from holdfast.errors import DamagedError
from holdfast.format.names import number_of_folder, visible_name
from holdfast.format.seal import SEAL

logger: logging.Logger = logging.getLogger("holdfast")


def newest_good_on_all_hosts(
    root: Path,
    pattern: re.Pattern[str],
    *,
    ranks: Ranks,
    decides: bool,
    last_file: str | None = None,
) -> Path | None:
    """Return the newest checkpoint in `root` that is good on every host; None if no host has
    a good checkpoint.

    `pattern`: names of checkpoints. `last_file`: name of the file that the framework writes last.

    `decides`: whether this rank looks into `root`. One rank per folder does: rank 0 if all hosts
    share the folder, else the first rank of each host. Every other rank gets the path of the
    nearest deciding rank before it, since the ranks of a host are consecutive.

    Collective.

    Raises:
        DamagedError: hosts have good checkpoints, but no checkpoint is good on every host.
    """

    def find(below: float) -> Path | None:
        if not decides or not root.is_dir():
            return None
        names = filter(None, (visible_name(path.name) for path in root.iterdir()))
        older = [
            name
            for name in names
            if pattern.fullmatch(name) and (number_of_folder(name) or 0) < below
        ]
        return newest_good(root, re.compile("|".join(map(re.escape, older))), last_file=last_file)

    def settle(paths: Sequence[Path | None]) -> list[Path | None]:
        of_ranks: list[Path | None] = []
        for path in paths:
            of_ranks.append(path or (of_ranks[-1] if of_ranks else None))
        if len({visible_name(path.name) for path in paths if path is not None}) > 1:
            raise _differ(root)
        return of_ranks

    below = math.inf
    while True:
        found = run_on_all(ranks, lambda: find(below))  # noqa: B023 - runs at once
        number = -1 if found is None else number_of_folder(found.name) or 0
        highest, negated = ranks.all_reduce_max([number, -number] if decides else [-1, -math.inf])
        lowest = -negated
        if highest == lowest:
            return gather_and_run(ranks, found, settle)[ranks.rank]
        if lowest < 0:
            raise _differ(root)
        # Some host has no good checkpoint after `lowest`, so none after it is good on all hosts.
        below = lowest + 1


def run_on_hosts(ranks: Ranks, work: Callable[[], object], *, decides: bool) -> None:
    """Run `work` on the ranks on which `decides` is true. An error of one rank is raised on all.

    Collective.
    """
    run_on_all(ranks, lambda: work() if decides else None)


def check_sealed(path: Path, hint: str) -> None:
    """Raise a DamagedError with this hint if the folder differs from its seal, or a StorageError if
    a file cannot be read. Warn if the folder has no seal."""
    if not (path / SEAL).exists():
        warn_unsealed(path)
    elif findings := check(path):
        raise_unreadable(str(path), findings)
        raise DamagedError(f"`{path}` is damaged: {summary_of(findings)}", hint=hint)


def warn_unsealed(where: object) -> None:
    """Warn that the checkpoint at a path or URL cannot be checked."""
    logger.warning("`%s` has no seal, so its bytes cannot be checked", where)


def none_good(folder: object) -> DamagedError:
    """Return the error for a folder or URL whose checkpoints are all damaged."""
    return DamagedError(
        f"no checkpoint in `{folder}` is good",
        hint=f"`holdfast doctor {folder}` says what is wrong with each",
    )


def _differ(root: Path) -> DamagedError:
    return DamagedError(
        f"no checkpoint in `{root}` is good on every host",
        hint=f"copy a good one to all hosts: `holdfast doctor {root}` says which are good on one",
    )
