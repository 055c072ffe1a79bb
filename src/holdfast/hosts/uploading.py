"""Upload checkpoints that other frameworks write on all ranks to an object store."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from holdfast.catalog.paths import open_for_saving
from holdfast.catalog.seal import Unsealed, begin, hash_files, seal_of
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.catalog.upload import make_folders, put_seal, upload
from holdfast.comm import Ranks, gather_and_run, run_on_all, run_on_rank_0
from holdfast.errors import StorageError
from holdfast.format.seal import SealedFile
from holdfast.hosts.folders import HostFolder, make_host_folder
from holdfast.hosts.raising import errors_on_all
from holdfast.spelling import rate

logger: logging.Logger = logging.getLogger("holdfast")


@contextmanager
def uploaded_by_all(url: str, *, ranks: Ranks, link: str | None = None) -> Iterator[Path]:
    """Publish the files that all ranks write in the `with` block at a URL, all or none.

    The context gives a local folder, which all ranks of the host share. At the end of the block,
    the first rank of each host uploads the files of its host. Then rank 0 adds the seal and
    publishes. Several hosts may write a file of the same name only if it has the same bytes on
    each. `link`: see `sealed_by_all`.

    Collective. An error of one rank is raised on all, and nothing is published.
    """
    folder = make_host_folder(ranks)
    unsealed: Unsealed | None = None
    try:
        unsealed = run_on_all(ranks, lambda: _begin(url, folder) if ranks.rank == 0 else None)
        itself = None if link is None or not folder.is_first else folder.path / link
        run_on_all(ranks, lambda: itself.symlink_to(".") if itself is not None else None)
        with errors_on_all(ranks):
            yield folder.path
        run_on_all(ranks, lambda: itself.unlink() if itself is not None else None)
        _publish(url, unsealed, folder, ranks)
    except BaseException:
        if unsealed is not None:
            unsealed.abort()
        raise
    finally:
        folder.delete()


def _begin(url: str, folder: HostFolder) -> Unsealed:
    def temporary() -> TemporaryFolder:
        assert folder.temporary is not None, "rank 0 is the first one of its host"
        return folder.temporary

    return begin(url, overwrite=True, temporary=temporary)


def _publish(url: str, unsealed: Unsealed | None, folder: HostFolder, ranks: Ranks) -> None:
    """Upload the files of all hosts, then the seal, and publish. `unsealed`: the checkpoint, on
    rank 0; None on other ranks. Collective."""
    started = time.perf_counter()
    files: dict[str, SealedFile] = {}

    def divide(found: Sequence[Mapping[str, SealedFile]]) -> tuple[str, list[list[str]]]:
        assert unsealed is not None, "this runs on rank 0"
        names = _divide(found, files)
        make_folders(unsealed.catalog.store, str(unsealed.attempt), files)
        return str(unsealed.attempt), names

    found = run_on_all(ranks, lambda: hash_files(folder.path) if folder.is_first else {})
    attempt, names = gather_and_run(ranks, found, divide)

    def put() -> None:
        own = {name: found[name] for name in names[ranks.rank]}
        upload(open_for_saving(url)[0].store, attempt, folder.path, own)

    def publish() -> None:
        assert unsealed is not None, "this runs on rank 0"
        put_seal(unsealed.catalog.store, attempt, seal_of(files, url))
        unsealed.publish()

    run_on_all(ranks, put)
    run_on_rank_0(ranks, publish)
    if ranks.rank == 0:
        nbytes = sum(file.nbytes for file in files.values())
        logger.info("saved `%s`: %s", url, rate(nbytes, time.perf_counter() - started))


def _divide(
    found: Sequence[Mapping[str, SealedFile]], into: dict[str, SealedFile]
) -> list[list[str]]:
    """Return the names of the files that each rank uploads, and add all files to `into`.

    `found`: one mapping per rank, which has the files of its host on the first rank of a host, and
    is empty on other ranks. The first of several hosts that have a file uploads it.

    Raises:
        StorageError: two hosts have written different files of the same name.
    """
    names: list[list[str]] = []
    for of_rank in found:
        names.append([name for name in of_rank if name not in into])
        for name, file in of_rank.items():
            if into.setdefault(name, file) != file:
                raise StorageError(
                    f"two hosts have written different files with the name `{name}`",
                    hint="let each rank write files with names of its own",
                )
    return names
