"""Checks one checkpoint, or finds the newest good one, whatever program wrote it."""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from holdfast.arguments import checked_path
from holdfast.catalog.catalog import location
from holdfast.catalog.fetch import fetch, files_below
from holdfast.catalog.findings import NAMED_MAX, Finding, VerifyReport, summary_of
from holdfast.catalog.open_any import format_of
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.seal import decode_seal, has_seal, matching
from holdfast.catalog.steady import LOOKS_MAX
from holdfast.catalog.temporary import ROOM, TemporaryFolder
from holdfast.catalog.verify import VerifyTarget, failed, verify
from holdfast.errors import (
    DamagedError,
    FormatError,
    HoldfastError,
    NotFoundError,
    StorageError,
    UsageError,
)
from holdfast.format.names import MANIFEST
from holdfast.format.seal import SEAL
from holdfast.storage.opening import is_url, local_path, open_store
from holdfast.storage.store import ReadStore, Stamping

logger: logging.Logger = logging.getLogger("holdfast")

FETCH_TO = "pass another `fetch_to=`, a folder with room for the checkpoint"
"""Hint for errors of the copy that `newest_good` makes."""

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

    `root` may be a URL. Then the checkpoint is copied to the local folder `fetch_to`, and the path
    of the copy is returned, such as `FETCH_TO/1f2e3d4c/checkpoint-6`. Sealed checkpoints are
    checked while they are copied. An existing copy of the same version is used again if it is good.
    Copies stay until you delete them.

    `pattern`: shell pattern for the names of the folders, or a compiled regular expression. The
    default is for transformers' Trainer; for the folder of a `CheckpointManager`, pass `step-*`. If
    no name matches, but there are checkpoints under other names, a warning names one of them.
    `quick`: compare sizes and indices only; copies are always compared in full. `last_file`: name
    of the file that the program writes last. An unsealed folder without this file is incomplete.

    Raises:
        UsageError: `root` is not the path of a folder or a URL, or is a URL without `fetch_to`.
        NotFoundError: `root` does not exist. (`holdfast.hosts.newest_good` returns None then.)
        StorageError: the copy cannot be written, for example because the disk is full.
    """
    names = compiled(pattern)
    store = open_store(checked_path(root, "root"))
    if isinstance(pattern, str):
        warn_of_other_names(store, pattern)
    if is_url(store.url):
        copies = LocalCopies(folder_to_fetch_to(store, fetch_to), hint=FETCH_TO)
        name = newest_name(store, names, copies.why_not, last_file=last_file)
        return None if name is None else copies.paths[name]
    found = newest_name(store, names, partial(why_not_good, quick=quick), last_file=last_file)
    return None if found is None else Path(location(store, found))


def warn_of_other_names(store: ReadStore, pattern: str) -> None:
    """If no folder at the root of a store has a name of `pattern`, but a checkpoint has another
    name, log a warning: the pattern may be wrong. Look at a few folders only."""
    if matching(store, compiled(pattern)):
        return
    for folder in matching(store, re.compile(".*"))[:NAMED_MAX]:
        if _has_checksums(store, folder):
            logger.warning(
                "`%s` has no folder named `%s`, but a checkpoint `%s`: pass another `pattern`",
                store.url,
                pattern,
                folder,
            )
            return


def newest_name(
    store: ReadStore,
    names: re.Pattern[str],
    why_not: Callable[[ReadStore, str], str | None],
    *,
    last_file: str | None = None,
) -> str | None:
    """Return the name of the newest good checkpoint at the root of a store: see `newest_good`.

    `why_not`: function that returns why a checkpoint is not good, or None. If it raises a
    NotFoundError, since another process has just deleted the checkpoint, the search begins again.
    """
    for _ in range(LOOKS_MAX - 1):
        with suppress(NotFoundError):
            return _newest_name(store, names, why_not, last_file)
    return _newest_name(store, names, why_not, last_file)


def _newest_name(
    store: ReadStore,
    names: re.Pattern[str],
    why_not: Callable[[ReadStore, str], str | None],
    last_file: str | None,
) -> str | None:
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
    if has_seal(store, name):
        return True
    try:
        return format_of(store, name) == "holdfast"
    except HoldfastError:
        return False


def why_not_good(store: ReadStore, name: str, *, quick: bool = False) -> str | None:
    """Return why a checkpoint must not be loaded; None if it is good.

    `quick`: compare sizes and indices only.

    Raises:
        StorageError: a store in a network did not answer.
    """
    target = VerifyTarget(store, name, quick)
    try:
        report: VerifyReport = verify(target)
    except NotFoundError as error:
        # Holdfast does not know the format. Accept a folder with files, but not an empty one.
        return None if store.list(name) else error.what
    except HoldfastError as error:
        if is_url(store.url) and isinstance(error, StorageError):
            raise  # The store did not answer. The checkpoint may be good.
        report = failed(target, error)
    return None if report.good else summary_of(report.findings)


def folder_to_fetch_to(store: ReadStore, fetch_to: str | os.PathLike[str] | None) -> Path:
    """Return the folder for copies of checkpoints, as an absolute path.

    Raises:
        UsageError: no folder is given, or a URL.
    """
    if fetch_to is None:
        raise UsageError(
            f"`newest_good` returns a local folder, and `{store.url}` is a URL",
            hint="pass `fetch_to=`, a local folder to copy the checkpoint to",
        )
    return Path(local_path(checked_path(fetch_to, "fetch_to")))


class LocalCopies:
    """Copies of good checkpoints in a folder of this machine."""

    def __init__(self, into: Path, *, hint: str = ROOM) -> None:
        """`into`: folder for the copies. `hint`: next step if its disk is full."""
        self._into, self._hint = into, hint
        self.paths: dict[str, Path] = {}
        """Path of each copy, by the name of the checkpoint."""

    def why_not(self, store: ReadStore, name: str) -> str | None:
        """Copy a checkpoint, unless a good copy is there. Return None if there is a good copy now,
        else the reason why there is none.

        Raises:
            NotFoundError: another process has just deleted the checkpoint.
            StorageError: the store does not answer, or the disk is full.
        """
        for looks_left in reversed(range(LOOKS_MAX)):
            version = _version(store, name)
            try:
                self.paths[name] = self._copied(store, name, version)
                return None
            except (DamagedError, FormatError) as error:
                # Another process may have replaced the checkpoint meanwhile.
                if not looks_left or _version(store, name) == version:
                    return error.what
        return None

    def _copied(self, store: ReadStore, name: str, version: _Version) -> Path:
        seal = None if version.seal is None else decode_seal(store, name, version.seal)
        if seal is None and (why := why_not_good(store, name)):
            raise DamagedError(why)
        target = self._into / version.digest / name
        temporary = TemporaryFolder.make(self._into, hint=self._hint)
        try:
            if target.exists():
                why = why_not_good(*open_for_reading(target))
                if why is None:
                    return target
                logger.warning("`%s` is a damaged copy, and is made again: %s", target, why)
                target.rename(temporary.path / "damaged")
            fetch(store, name, temporary.path / name, seal, hint=self._hint)
            target.parent.mkdir(exist_ok=True)
            (temporary.path / name).rename(target)
        except OSError as error:
            # Another process may have made the same copy meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                what = f"cannot copy to `{target}`: {error.strerror or error}"
                raise StorageError(what, hint=self._hint) from error
        finally:
            temporary.delete()
        return target


@dataclass(frozen=True, slots=True)
class _Version:
    """Identity of the checkpoint that a name has now."""

    digest: str
    """Eight hexadecimal digits. No other version of the checkpoint has the same."""

    seal: bytes | None
    """Bytes of the seal; None if there is none."""


def _version(store: ReadStore, name: str) -> _Version:
    files = store.list(name)
    for index in (SEAL, MANIFEST):
        if index in files:
            key = f"{name}/{index}"
            data = store.read(key, 0, store.size(key))
            return _Version(f"{zlib.crc32(data):08x}", data if index == SEAL else None)
    if not isinstance(store, Stamping):
        return _Version(os.urandom(4).hex(), None)  # A copy of it is never used again.
    folders = sorted({f"{name}/{file}".rpartition("/")[0] for file in files_below(store, name)})
    stamps = repr([(folder, store.stamp(folder)) for folder in folders])
    return _Version(f"{zlib.crc32(stamps.encode()):08x}", None)
