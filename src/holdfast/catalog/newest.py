"""Checks one checkpoint, or finds the newest good one, whatever program wrote it."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from pathlib import Path

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import location
from holdfast.catalog.findings import Finding, VerifyReport, summary_of
from holdfast.catalog.open_any import format_of
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.seal import is_sealed, matching
from holdfast.catalog.verify import VerifyTarget, failed, verify
from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.storage.opening import open_store
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
) -> Path | None:
    """Return the newest good checkpoint among the folders in `root`; None if there is none.

    The newest folder is the one with the highest last number in its name. Its files are compared
    with its checksums. A damaged or incomplete folder is skipped with a warning, and the next one
    is tried.

    Folders that are neither sealed nor checkpoints of Holdfast have no checksums. They are skipped
    too, unless `root` has no other folders. Then the newest folder with a complete structure is
    returned. The structure is checked only if Holdfast knows the format.

    `pattern`: shell pattern for the names of the folders, or a compiled regular expression.
    `quick`: compare sizes and indices only. `last_file`: name of the file that the program writes
    last. An unsealed folder without this file is incomplete.

    Raises:
        UsageError: `root` is not the path of a folder on this machine.
        NotFoundError: `root` does not exist.
    """
    names = compiled(pattern)
    store = open_store(checked_path(root, "root"))
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
            why = _why_not_good(store, folder, quick=quick)
        if why is None:
            if not checked:
                logger.warning("`%s` has no seal: its bytes cannot be checked", where)
            return Path(where)
        logger.warning("passed over `%s`: %s", where, why)
    return None


def _has_checksums(store: ReadStore, name: str) -> bool:
    if is_sealed(store, name):
        return True
    try:
        return format_of(store, name) == "holdfast"
    except HoldfastError:
        return False


def _why_not_good(store: ReadStore, name: str, *, quick: bool) -> str | None:
    target = VerifyTarget(store, name, quick)
    try:
        report: VerifyReport = verify(target)
    except NotFoundError as error:
        # Holdfast does not know the format. Accept a folder with files, but not an empty one.
        return None if store.list(name) else error.what
    except HoldfastError as error:
        report = failed(target, error)
    return None if report.good else summary_of(report.findings)
