"""`sealed` and `newest_good` for a job of several processes: every rank calls them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from holdfast.arguments import checked_path
from holdfast.catalog.newest import (
    CHECKPOINTS,
    compiled,
    folder_to_fetch_to,
    warn_of_other_names,
)
from holdfast.catalog.paths import full_path
from holdfast.comm import all_ranks
from holdfast.errors import HoldfastError
from holdfast.hosts.choosing import newest_good_on_all_hosts
from holdfast.hosts.folders import fetch_newest_on_all_hosts
from holdfast.hosts.sealing import sealed_by_all
from holdfast.storage.opening import is_url, open_store


@contextmanager
def sealed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Publish the files that all ranks write in the `with` block, all or none, as the folder
    `path`.

    As `holdfast.sealed`, for functions of other programs in which every rank writes files. The
    context gives the same folder on every rank. Rank 0 seals and publishes it once all ranks have
    left the block. A sealed folder or checkpoint at `path` is replaced.

    If `path` is the URL of an object store, all ranks of a host get the same local folder, below
    TMPDIR. Each host uploads its files at the end of the block.

    Collective. An error of one rank is raised on all, and nothing is published.

    Raises:
        ExistsError: a folder with files of others is at `path`.
        RankError: another rank has raised an error in the block.
        UsageError: `path` is neither the path of a folder nor the URL of an object store, or the
            block has written nothing.
        StorageError: a rank does not see the folder, or a file cannot be synced or uploaded.
    """
    place = full_path(checked_path(path, "path"))
    ranks = all_ranks()
    try:
        with sealed_by_all(place, ranks=ranks, publishes=ranks.rank == 0) as folder:
            yield folder
    finally:
        ranks.close()


def newest_good(
    root: str | os.PathLike[str],
    pattern: str | re.Pattern[str] = CHECKPOINTS,
    *,
    fetch_to: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Return the newest good checkpoint in `root`, the same on every rank; None if there is none.

    As `holdfast.newest_good`: rank 0 compares all files with their checksums, and tells the others
    the path. If `root` does not exist, the result is None, so that a first start needs no check;
    `holdfast.newest_good` raises a NotFoundError then.

    If `root` is a URL, the checkpoint is copied to the folder `fetch_to` on each host, and the path
    of the copy on this host is returned.

    Collective. An error of one rank is raised on all.

    Raises:
        UsageError: an argument has the wrong type, or `root` is a URL without `fetch_to`.
        StorageError: the copy cannot be written.
    """
    place = full_path(checked_path(root, "root"))
    names = compiled(pattern)
    into = folder_to_fetch_to(open_store(place), fetch_to) if is_url(place) else None
    ranks = all_ranks()
    try:
        if into is not None:
            return fetch_newest_on_all_hosts(place, names, into=into, ranks=ranks)
        decides = ranks.rank == 0
        newest = newest_good_on_all_hosts(Path(place), names, ranks=ranks, decides=decides)
        if newest is None and decides and isinstance(pattern, str):
            with suppress(HoldfastError):
                warn_of_other_names(open_store(place), pattern)
        return newest
    finally:
        ranks.close()
