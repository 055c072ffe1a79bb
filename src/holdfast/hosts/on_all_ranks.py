"""`sealed` and `newest_good` for a job of several processes: every rank calls them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.arguments import checked_path
from holdfast.catalog.newest import CHECKPOINTS, compiled
from holdfast.comm import all_ranks
from holdfast.hosts.choosing import newest_good_on_all_hosts
from holdfast.hosts.sealing import sealed_by_all
from holdfast.storage.opening import local_path


@contextmanager
def sealed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Publish the files that all ranks write in the `with` block, all or none, as the folder
    `path`.

    As `holdfast.sealed`, for functions of other programs in which every rank writes files. The
    context gives the same folder on every rank. Rank 0 seals and publishes it once all ranks have
    left the block. A sealed folder or checkpoint at `path` is replaced.

    Collective. An error of one rank is raised on all, and nothing is published.

    Raises:
        ExistsError: a folder with files of others is at `path`.
        RankError: another rank has raised an error in the block.
        UsageError: `path` is no path of a folder, or the block has written nothing.
        StorageError: a rank does not see the folder, or it cannot be synced or renamed.
    """
    place = local_path(checked_path(path, "path"))
    ranks = all_ranks()
    try:
        with sealed_by_all(place, ranks=ranks, publishes=ranks.rank == 0) as folder:
            yield folder
    finally:
        ranks.close()


def newest_good(
    root: str | os.PathLike[str], pattern: str | re.Pattern[str] = CHECKPOINTS
) -> Path | None:
    """Return the newest good checkpoint in `root`, the same on every rank; None if there is none.

    As `holdfast.newest_good`: rank 0 compares all files with their checksums, and tells the others
    the path. If `root` does not exist, the result is None, so that a first start needs no check.

    Collective. An error of rank 0 is raised on all.

    Raises:
        UsageError: an argument has the wrong type, or `root` is a URL.
    """
    place = Path(local_path(checked_path(root, "root")))
    names = compiled(pattern)
    ranks = all_ranks()
    try:
        return newest_good_on_all_hosts(place, names, ranks=ranks, decides=ranks.rank == 0)
    finally:
        ranks.close()
