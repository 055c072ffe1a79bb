"""Local folders that all ranks of a host share, for checkpoints in object stores."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import fetch
from holdfast.catalog.newest import LocalCopies, newest_name
from holdfast.catalog.paths import full_path, open_for_reading
from holdfast.catalog.seal import has_seal, read_seal
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.comm import Ranks, capture, gather_and_run, hosts_of, run_on_all, run_on_rank_0
from holdfast.errors import DamagedError, NotFoundError, StorageError
from holdfast.hosts.choosing import warn_unsealed
from holdfast.hosts.raising import errors_on_all
from holdfast.storage.opening import is_url, open_store
from holdfast.storage.store import ReadStore


@dataclass(frozen=True, slots=True)
class HostFolder:
    """A folder that all ranks of a host see."""

    path: Path
    is_first: bool
    """Whether this rank is the first one of its host. It moves files for all ranks of the host."""

    temporary: TemporaryFolder | None
    """The folder, on the rank that deletes it; None on other ranks."""

    def delete(self) -> None:
        """Delete the folder, on the rank that made it. May be called twice."""
        if self.temporary is not None:
            self.temporary.delete()


def make_host_folder(ranks: Ranks) -> HostFolder:
    """Make an empty folder on each host, in the folder for temporary files.

    Collective.

    Raises:
        StorageError: a folder cannot be made, or a rank does not see the folder of its host.
    """
    first = _first_of_host(ranks)
    temporary: TemporaryFolder | None = None

    def make() -> Path | None:
        nonlocal temporary
        temporary = TemporaryFolder.make() if ranks.rank == first else None
        return None if temporary is None else temporary.path

    try:
        paths: list[Path | None] = gather_and_run(ranks, capture(make), list)
        path = paths[first]
        assert path is not None, "the first rank has made the folder"
        run_on_all(ranks, partial(_check_visible, path))
    except BaseException:
        if temporary is not None:
            temporary.delete()
        raise
    return HostFolder(path, ranks.rank == first, temporary)


@contextmanager
def host_folder(ranks: Ranks) -> Iterator[Path]:
    """Context that gives an empty folder on each host, to load a checkpoint from. The folder is
    deleted once all ranks have left the context.

    Collective. An error of one rank is raised on all.
    """
    folder = make_host_folder(ranks)
    try:
        with errors_on_all(ranks, "load", "start the job again"):
            yield folder.path
    finally:
        folder.delete()


def _first_of_host(ranks: Ranks) -> int:
    hosts = hosts_of(ranks)
    return hosts.index(hosts[ranks.rank])


def is_first_of_host(ranks: Ranks) -> bool:
    """Return whether this rank is the first one of its host. Collective."""
    return _first_of_host(ranks) == ranks.rank


def _check_visible(path: Path) -> None:
    if not path.is_dir():
        raise StorageError(
            f"this rank does not see `{path}`, which another rank of its host has made",
            hint="set TMPDIR to a folder that all processes of a host share",
        )


def fetch_on_all_hosts(url: str, into: Path, ranks: Ranks, *, marker: str | None = None) -> Path:
    """Copy the checkpoint at a URL to the folder `into` on each host. Return the path of the copy.

    A sealed checkpoint is checked while it is copied. Others are copied with a warning. `marker`:
    name of a file that every checkpoint has.

    Collective. An error of one rank is raised on all.

    Raises:
        DamagedError: the checkpoint differs from its seal.
        NotFoundError: there is no checkpoint at the URL.
    """
    store, name = open_for_reading(url)

    def copy() -> None:
        names = store.list(name)
        if not names or (marker is not None and marker not in names):
            missing = "" if not names else f": it has no `{marker}`"
            raise NotFoundError(f"`{url}` is no checkpoint{missing}")
        sealed = has_seal(store, name)
        if ranks.rank == 0 and not sealed:
            warn_unsealed(url)
        fetch(store, name, into / name, read_seal(store, name) if sealed else None)

    is_first = is_first_of_host(ranks)
    run_on_all(ranks, lambda: copy() if is_first else None)
    return into / name


def fetch_newest_on_all_hosts(
    root: str,
    pattern: re.Pattern[str],
    *,
    into: Path,
    ranks: Ranks,
    last_file: str | None = None,
) -> Path | None:
    """Copy the newest good checkpoint below a URL to the folder `into` on each host. Return the
    path of the copy; None if no checkpoint is good.

    `last_file`: see `newest_good`.

    Collective. Rank 0 chooses the checkpoint. An error of one rank is raised on all.
    """
    store = open_store(root)
    copies = LocalCopies(into)

    def choose() -> tuple[str, Path] | None:
        name = newest_name(store, pattern, copies.why_not, last_file=last_file)
        return None if name is None else (name, copies.paths[name].relative_to(into))

    is_first = is_first_of_host(ranks)
    chosen = run_on_rank_0(ranks, choose)
    if chosen is None:
        return None
    name, relative = chosen
    copies_too = is_first and ranks.rank > 0
    run_on_all(ranks, lambda: copy_again(store, name, into, relative) if copies_too else None)
    return into / relative


def copy_again(store: ReadStore, name: str, into: Path, relative: Path) -> None:
    """Copy a checkpoint that rank 0 has copied to the path `relative` in a folder of its host.

    Raises:
        DamagedError: the checkpoint is damaged by now, or was replaced.
    """
    copies = LocalCopies(into)
    why = copies.why_not(store, name)
    if why is None and copies.paths[name] != into / relative:
        why = "it was replaced"
    if why is not None:
        raise DamagedError(
            f"`{location(store, name)}` was good when rank 0 copied it, and now: {why}",
            hint="start the job again",
        )


def identity(path: str) -> str:
    """Return a text that is equal for all paths of one folder, or all forms of one URL."""
    full = full_path(path)
    return full if is_url(full) else os.path.realpath(full)


def folder_beside(url: str) -> Path:
    """Return the folder of this machine for the files that a framework writes beside the
    checkpoints at a URL. It is always the same one for this URL and this user.

    Raises:
        StorageError: it cannot be made, or belongs to another user.
    """
    folder = Path(tempfile.gettempdir(), f"holdfast-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.lstat().st_uid
    except OSError as error:
        raise StorageError(f"cannot make `{folder}`: {error.strerror or error}") from error
    if owner != os.getuid() or folder.is_symlink():
        raise StorageError(
            f"`{folder}` belongs to another user",
            hint="set TMPDIR to a folder of your own",
        )
    # The name is the last part of the URL, since frameworks name models after it.
    return folder / hashlib.sha256(url.encode()).hexdigest()[:8] / url.rpartition("/")[2]
