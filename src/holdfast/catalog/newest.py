"""Checks one checkpoint, or finds the newest good one, whatever program wrote it."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import fetch
from holdfast.catalog.findings import Finding, VerifyReport, summary_of
from holdfast.catalog.open_any import format_of
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.seal import is_sealed, matching, read_seal
from holdfast.catalog.staging import Staging
from holdfast.catalog.verify import VerifyTarget, failed, verify
from holdfast.errors import (
    DamagedError,
    ExistsError,
    FormatError,
    HoldfastError,
    NotFoundError,
    UsageError,
)
from holdfast.storage.opening import is_url, local_path, open_store
from holdfast.storage.store import ReadStore

logger: logging.Logger = logging.getLogger("holdfast")

CHECKPOINTS = "checkpoint-*"
"""Pattern for the names of folders that transformers' Trainer saves."""


def check(path: str | os.PathLike[str], *, quick: bool = False) -> list[Finding]:
    """Compare every byte of a checkpoint with its checksums. An empty list means that the
    checkpoint is good.

    `path`: a sealed folder, a checkpoint of Holdfast or of stock DCP, a Hugging Face folder, or a
    file. If a format has no checksums, only its structure is checked.

    `quick`: compare sizes and indices only.

    Raises:
        NotFoundError: there is no checkpoint at `path`.
        FormatError: the checkpoint is malformed, or refers to code.
    """
    store, name = open_for_reading(checked_path(path, "path"))
    return [*verify(VerifyTarget(store, name, quick)).findings]


def compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    """Return the regular expression of a pattern for the names of folders, which may be a shell
    pattern.

    Raises:
        UsageError: `pattern` is neither.
    """
    if not isinstance(pattern, str | re.Pattern):
        raise UsageError(f"`pattern` must be text such as `{CHECKPOINTS}`, found: {pattern!r}")
    return re.compile(fnmatch.translate(pattern)) if isinstance(pattern, str) else pattern


def newest_good(
    root: str | os.PathLike[str],
    pattern: str | re.Pattern[str] = CHECKPOINTS,
    *,
    quick: bool = False,
    last_file: str | None = None,
    fetch_to: str | os.PathLike[str] | None = None,
) -> Path | None:
    """Return the newest good checkpoint among the folders in `root`; None if there is none.

    The newest folder is the one with the highest last number in its name. Its files are compared
    with its checksums. A damaged or incomplete folder is skipped with a warning, and the next one
    is tried.

    Folders that are neither sealed nor checkpoints of Holdfast have no checksums. They are skipped
    too, unless `root` has no other folders. Then the newest folder with a complete structure is
    returned. The structure is checked only if Holdfast knows the format.

    `root` may be a URL. Then the checkpoint is copied to the folder `fetch_to` of this machine, and
    the path of the copy is returned. Sealed checkpoints are checked while they are copied. A copy
    that is there already is used again if it is good.

    `pattern`: shell pattern for the names of the folders, or a compiled regular expression.
    `quick`: compare sizes and indices only; copies are always compared in full. `last_file`: name
    of the file that the program writes last. An unsealed folder without this file is incomplete.

    Raises:
        UsageError: `root` is not the path of a folder or a URL, or is a URL without `fetch_to`.
        NotFoundError: `root` does not exist.
        ExistsError: something else has the name of the copy in `fetch_to`.
        StorageError: the copy cannot be written, for example because the disk is full.
    """
    names = compiled(pattern)
    store = open_store(checked_path(root, "root"))
    if is_url(store.url):
        into = folder_to_fetch_to(store, fetch_to)
        found = newest_name(store, names, partial(why_not_fetched, into), last_file=last_file)
        return None if found is None else into / found
    found = newest_name(store, names, partial(why_not_good, quick=quick), last_file=last_file)
    return None if found is None else Path(location(store, found))


def newest_name(
    store: ReadStore,
    names: re.Pattern[str],
    why_not: Callable[[ReadStore, str], str | None],
    *,
    last_file: str | None = None,
) -> str | None:
    """Return the name of the newest good checkpoint at the root of a store: see `newest_good`.

    `why_not`: function that returns why a checkpoint is not good, or None.
    """
    folders = matching(store, names)
    checked = {folder for folder in folders if _has_checksums(store, folder)}
    for folder in folders:
        where = location(store, folder)
        if checked and folder not in checked:
            logger.warning("passed over `%s`: it has no seal, so it cannot be checked", where)
            continue
        if not checked and last_file is not None and last_file not in store.list(folder):
            why: str | None = f"`{last_file}`, which is written last, is missing"
        else:
            why = why_not(store, folder)
        if why is None:
            if not checked:
                logger.warning("`%s` has no seal: its bytes cannot be checked", where)
            return folder
        logger.warning("passed over `%s`: %s", where, why)
    return None


def _has_checksums(store: ReadStore, name: str) -> bool:
    if is_sealed(store, name):
        return True
    try:
        return format_of(store, name) == "holdfast"
    except HoldfastError:
        return False


def why_not_good(store: ReadStore, name: str, *, quick: bool = False) -> str | None:
    """Return why a checkpoint must not be loaded; None if it is good.

    `quick`: compare sizes and indices only.
    """
    target = VerifyTarget(store, name, quick)
    try:
        report: VerifyReport = verify(target)
    except NotFoundError as error:
        # Holdfast does not know the format. Accept a folder with files, but not an empty one.
        return None if store.list(name) else error.what
    except HoldfastError as error:
        report = failed(target, error)
    return None if report.good else summary_of(report.findings)


def folder_to_fetch_to(store: ReadStore, fetch_to: str | os.PathLike[str] | None) -> Path:
    """Return the folder for copies of checkpoints, as an absolute path.

    Raises:
        UsageError: no folder is given, or a URL.
    """
    if fetch_to is None:
        raise UsageError(
            f"`{store.url}` is a URL, and `newest_good` returns a folder of this machine",
            hint="pass `fetch_to=`, a folder of this machine to copy the checkpoint to",
        )
    return Path(local_path(checked_path(fetch_to, "fetch_to")))


def why_not_fetched(into: Path, store: ReadStore, name: str) -> str | None:
    """Copy a checkpoint to the folder `into`, unless a good copy is there. Return None, or why the
    checkpoint is not good: then nothing is copied."""
    sealed = is_sealed(store, name)
    if not sealed and (why := why_not_good(store, name)):
        return why
    target = into / name
    try:
        if target.exists():
            if sealed and _is_copy(store, name, target):
                return None
            raise ExistsError(
                f"`{target}` exists, and is not a good copy of `{location(store, name)}`",
                hint="delete it, or give another folder to copy to",
            )
        staging = Staging.make(into)
        try:
            fetch(store, name, staging.path / name)
            (staging.path / name).rename(target)
        finally:
            staging.delete()
    except (DamagedError, FormatError) as error:
        return error.what
    return None


def _is_copy(store: ReadStore, name: str, target: Path) -> bool:
    """Return whether the folder `target` is good, and has the seal of a checkpoint in a store."""
    copies, copy = open_for_reading(target)
    try:
        same = read_seal(copies, copy).files == read_seal(store, name).files
    except HoldfastError:
        return False
    return same and why_not_good(copies, copy) is None
