"""Finds the fast tier of a run, by a record in the run's durable folder.

The record `.tier.json` holds the name of the folder that the run has on every host, and the path of
the folder that contains it. The name is random, so that two runs can use one disk.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.catalog.catalog import read_manifest
from holdfast.errors import FormatError, HoldfastError
from holdfast.format.names import TIER, steps_among
from holdfast.storage.local import LocalStore
from holdfast.storage.opening import folder_store
from holdfast.storage.store import ReadStore, Store

HOSTS_MAX = 1024
"""Most hosts whose folders are listed."""

_BYTES_MAX = 1 << 16
_ID = re.compile(r"run-[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TierRecord:
    """Place of the checkpoints of one run on its hosts."""

    id: str
    """Name of the run's folder below `local_folder`."""

    local_folder: str
    """Absolute path of the folder around the run's folder, on every host. `{host}` in the path
    stands for the name of the host."""

    def folder_on(self, host: str) -> str:
        """Return the path of the run's folder on a host."""
        return f"{self.local_folder.replace('{host}', host).rstrip('/')}/{self.id}"

    def folders_here(self) -> dict[str, str]:
        """Return the run's folders that this machine can see, by host: the folder of this host and,
        if `local_folder` contains `{host}`, those folders of other hosts that are mounted next to
        it."""
        before, mark, after = self.local_folder.partition("{host}")
        hosts = [os.uname().nodename]
        if mark:
            above, start = os.path.split(before)
            name = re.compile(re.escape(start) + "(.+)" + re.escape(after.partition("/")[0]))
            with suppress(OSError):
                matches = [name.fullmatch(path.name) for path in Path(above).iterdir()]
                hosts += sorted(match[1] for match in matches if match)
        folders = {host: self.folder_on(host) for host in hosts[:HOSTS_MAX]}
        return {host: folder for host, folder in folders.items() if Path(folder).is_dir()}


def read_tier(store: ReadStore, folder: str = "") -> TierRecord | None:
    """Return the record in the durable folder of a run; None if the run has no fast tier.

    Raises:
        FormatError: the record is malformed.
    """
    key = f"{folder}/{TIER}" if folder else TIER
    if TIER not in store.list(folder):
        return None
    where = f"{store.url.rstrip('/')}/{key}"
    if store.leads_out(folder, TIER):
        raise FormatError(f"`{where}` is a link to a place outside of its folder")
    try:
        found: Any = json.loads(store.read(key, 0, _BYTES_MAX))
        record = TierRecord(found["id"], found["local_folder"])
        if _ID.fullmatch(record.id) and os.path.isabs(record.local_folder):  # noqa: PTH117
            return record
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise FormatError(
        f"`{where}` is no record of a fast tier",
        hint="delete it: the next start of the run writes another, and does not find the "
        "checkpoints on the hosts",
    )


def claim_tier(store: Store, local_folder: str) -> TierRecord:
    """Return the record of a run's fast tier. Write a new record if the stored one is missing, is
    malformed or has another `local_folder`. `store`: durable folder of the run.

    Only the run that has locked the durable folder may call this.
    """
    found = None
    with suppress(FormatError):
        found = read_tier(store)
        if found is not None and found.local_folder == local_folder:
            return found
    record = TierRecord(found.id if found else f"run-{os.urandom(8).hex()}", local_folder)
    if TIER in store.list():
        store.remove(TIER)
    data = json.dumps({"id": record.id, "local_folder": record.local_folder}).encode()
    with store.create(TIER, len(data)) as writer:
        writer.write(0, [data])
    store.sync("")
    return record


def local_store(store: ReadStore, folder: str = "") -> ReadStore | None:
    """Return the store of the checkpoints in a run's fast tier on this host; None if there is none.
    `folder`: durable folder of the run."""
    try:
        record = read_tier(store, folder)
        if record is None:
            return None
        local = folder_store(record.folder_on(os.uname().nodename))
        local.list()
    except HoldfastError:
        return None
    return local


def host_stores(record: TierRecord) -> dict[str, LocalStore]:
    """Return, by host name, the store of a run's checkpoints on each host whose folder this machine
    can see. Folders that cannot be listed are left out."""
    stores = {}
    for host, folder in record.folders_here().items():
        with suppress(HoldfastError):
            store = folder_store(folder)
            store.list()
            stores[host] = store
    return stores


@dataclass(frozen=True, slots=True)
class TierView:
    """The fast tier of a run, as far as this machine sees it."""

    hosts: Sequence[str]
    """Hosts whose folder this machine sees."""

    step: int | None = None
    """Newest step that one of `hosts` has published. A host publishes a step only after all hosts
    have written it."""

    num_files: int = 0
    """Number of data files of `step`, on all hosts."""

    num_seen: int = 0
    """Number of data files of `step` that are on `hosts`."""

    copies: int = 0
    """Number of copies on `hosts` of the data file with the fewest copies."""


def view_tier(stores: Mapping[str, ReadStore]) -> TierView:
    """Describe the newest checkpoint of a run's fast tier. `stores`: store of the run's folder on
    each host, by host name."""
    hosts = sorted(stores)
    folders: dict[str, dict[int, str]] = {}
    for host in hosts:
        with suppress(HoldfastError):
            folders[host] = steps_among(stores[host].list())
    step = max((step for steps in folders.values() for step in steps), default=None)
    if step is None:
        return TierView(hosts)
    expected: Sequence[str] = ()
    counts: Counter[str] = Counter()
    for host, steps in folders.items():
        if step in steps:
            with suppress(HoldfastError):
                # Every host has the same manifest, so take the expected files from any of them.
                files = read_manifest(stores[host], steps[step], entries=False).files
                expected = expected or [*files]
                counts.update(files.keys() & {*stores[host].list(steps[step])})
    copies = min((counts[file] for file in expected), default=0)
    return TierView(hosts, step, len(expected), len(counts), copies)
