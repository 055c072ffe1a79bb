"""Check that the hosts of a job share the folder that they save to."""

from __future__ import annotations

import time
from contextlib import suppress

from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks, capture, gather_and_run, hosts_of, run_on_rank_0
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.names import HiddenFolder
from holdfast.storage.opening import is_url
from holdfast.storage.store import ReadStore

SEEN_S = 5.0
"""Seconds within which a host must see a new folder. Network file systems cache listings for a
short time."""

_START = "start"
"""Checkpoint name of the attempt that `check_start` makes for the other hosts to find."""


def check_start(catalog: Catalog, ranks: Ranks, *, saves: bool) -> None:
    """Check that all hosts see the same folder of a run. Rank 0 makes a temporary folder there, and
    each host looks for it. If the run does not save, each host looks for the newest checkpoint.

    Collective: every rank calls this. It writes nothing if all ranks are on one host.

    Raises:
        StorageError: some hosts do not see the folder. The message names them.
    """
    hosts = _hosts_to_ask(catalog.store, ranks)
    if not hosts:
        return
    if not saves:
        newest = run_on_rank_0(ranks, lambda: [*catalog.folders().values()][-1:])
        for folder in newest:
            check_seen(catalog.store, folder, ranks, hosts)
        return
    made = run_on_rank_0(ranks, lambda: catalog.begin(_START))
    try:
        check_seen(catalog.store, str(made), ranks, hosts)
    finally:
        if ranks.rank == 0:
            catalog.abort(made)


def check_attempt(catalog: Catalog, attempt: HiddenFolder, ranks: Ranks) -> None:
    """Check that all hosts see an attempt that rank 0 has made: see `check_start`. Collective."""
    hosts = _hosts_to_ask(catalog.store, ranks)
    if hosts:
        check_seen(catalog.store, str(attempt), ranks, hosts)


def check_seen(store: ReadStore, folder: str, ranks: Ranks, hosts: list[str]) -> None:
    """Check that each host sees a folder at the root of the store. `hosts`: host of each rank. One
    rank per host looks. Collective."""
    host = hosts[ranks.rank]
    looks = ranks.rank == hosts.index(host)

    def refuse(seen: list[bool]) -> None:
        blind = list(dict.fromkeys(h for h, sees in zip(hosts, seen, strict=True) if not sees))
        if blind:
            raise StorageError(
                f"`{store.url}` is another folder on host {', '.join(blind)} than on host "
                f"{hosts[0]}, whose files are not there",
                hint="all hosts need the same folder: one on a network file system that each of "
                "them has mounted there, or an object store",
            )

    gather_and_run(ranks, capture(lambda: not looks or _sees(store, folder)), refuse)


def _hosts_to_ask(store: ReadStore, ranks: Ranks) -> list[str]:
    """Return the host of each rank. Return `[]` if there is nothing to check: all ranks are on one
    host, or the store has a URL, which means the same on every host. Collective."""
    hosts = [] if is_url(store.url) else hosts_of(ranks)
    return hosts if len({*hosts}) > 1 else []


def _sees(store: ReadStore, folder: str) -> bool:
    deadline = time.monotonic() + SEEN_S
    while True:
        with suppress(HoldfastError):
            if f"{folder}/" in store.list():
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
