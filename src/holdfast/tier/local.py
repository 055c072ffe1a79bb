"""The folder of a run on each host in the fast tier, and saves into it.

Each rank writes its data file to the disk of its own host. The lowest rank of a host makes the
attempt there and publishes it, with the same index files on every host. So each host has some of
the data files of a checkpoint, and all hosts together have all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.catalog.tier import TierRecord
from holdfast.comm import Ranks, host_of, hosts_of, run_on_all
from holdfast.errors import HoldfastError
from holdfast.failures import tried
from holdfast.format.names import LOCK, HiddenFolder, data_file
from holdfast.saving.commit import run_if_alike
from holdfast.saving.publish import index_files, write_index
from holdfast.saving.remove import Remover
from holdfast.saving.save import Pending, check_space
from holdfast.saving.write import WriteResult
from holdfast.storage.opening import folder_store
from holdfast.tier.transfer import Transfer, transfer

logger: logging.Logger = logging.getLogger("holdfast")

KEPT = 2
"""Number of newest checkpoints that each host keeps. After an interrupted save, other hosts may
lack the newest one, so that all hosts need the one before it."""


class LocalTier:
    """The part of the fast tier on the host of this rank: the folder of the run there.

    Collective: every rank makes a `LocalTier` and calls its methods in the same order.
    """

    def __init__(self, record: TierRecord, ranks: Ranks, *, replicas: int = 0) -> None:
        """`replicas`: number of other hosts (0 or 1) that keep copies of each host's files."""
        self.hosts: list[str] = hosts_of(ranks)
        """Host of each rank."""
        self.host: str = self.hosts[ranks.rank]
        self.leaders: dict[str, int] = {host: self.hosts.index(host) for host in self.hosts}
        """Lowest rank of each host, which makes, publishes and deletes the checkpoints there."""
        self.leads: bool = ranks.rank == self.leaders[self.host]
        """Whether this rank is the one in `leaders` for its host."""
        self.catalog: Catalog = Catalog(folder_store(record.folder_on(host_of(ranks))))
        self.draining: int | None = None
        """Step that is being copied from the fast tier to the folder of the run."""
        self._replicas = replicas
        self._remover = Remover(self.catalog)

    def open(self, held: ExitStack, note: str) -> None:
        """Lock the folder until `held` ends, and clean up after killed runs. Not collective.

        Raises:
            ExistsError: another host or another run has locked the same folder.
            StorageError: the folder cannot be written.
        """
        if not self.leads:
            return
        store = self.catalog.store
        store.make_folder("")
        self.catalog.check_lock = held.enter_context(store.lock(LOCK, note))
        put_in_order(store)

    def attempt(self, name: str) -> HiddenFolder:
        """Return a random name for a new attempt of `name`. All hosts use the one of rank 0."""
        return HiddenFolder("attempt", name, os.urandom(4).hex())

    def begin(self, pending: Pending, ranks: Ranks) -> Pending:
        """Make the attempt of a save on every host. If this fails on one host, for example for lack
        of space, raise the error on all ranks. Collective.

        Return a copy of `pending` that saves to the folder of this host.
        """
        sizes = ranks.broadcast(ranks.gather(pending.file_nbytes))
        pending = replace(pending, catalog=self.catalog, deletes=self.leads)
        copies = self._copies(sizes, pending.attempt)

        def make() -> None:
            if self.leads:
                own = sum(n for n, host in zip(sizes, self.hosts, strict=True) if host == self.host)
                more = sum(copy.nbytes for copy in copies if self.hosts[copy.target] == self.host)
                check_space(self.catalog, pending.attempt.name, own + more)
                self._make(pending.attempt)

        try:
            run_on_all(ranks, make)
        except HoldfastError:
            self.abort(pending.attempt)
            raise
        return pending

    def _make(self, attempt: HiddenFolder) -> None:
        self.catalog.begin(attempt.name, replace=True, chosen_id=attempt.id)

    def make_attempt(self, attempt: HiddenFolder, ranks: Ranks) -> None:
        """Make an attempt on every host. Collective."""
        run_on_all(ranks, lambda: self._make(attempt) if self.leads else None)

    def commit(self, pending: Pending, written: WriteResult | HoldfastError, ranks: Ranks) -> int:
        """Publish a save on every host. `finish_save` gets this as `commit_by`. Collective.

        `written`: write result of this rank, or its error. Return the checkpoint's size
        in bytes.
        """
        index, facts, attempt = pending.index, pending.facts, pending.attempt

        def make_index(
            results: Sequence[WriteResult],
        ) -> tuple[dict[str, bytes], int, list[int]]:
            assert index is not None
            files, nbytes = index_files(results, index, facts)
            joined = {name: b"".join(parts) for name, parts in files.items()}
            return joined, nbytes, [result.nbytes for result in results]

        try:
            digests = pending.replicas.digests
            files, nbytes, sizes = run_if_alike(written, digests, ranks, make_index)
            transfer(self._copies(sizes, attempt), self.catalog.store, ranks)
            # All hosts have written everything before the first of them publishes.
            run_on_all(ranks, lambda: self._write_index(attempt, files))
            run_on_all(ranks, lambda: self._publish(attempt))
        except HoldfastError:
            self.abort(attempt)
            raise
        return nbytes

    def abort(self, attempt: HiddenFolder) -> None:
        """Delete an attempt on this host."""
        if self.leads:
            self.catalog.abort(attempt)

    def retain(self, step: int) -> None:
        """Delete the checkpoints of this host up to `step`, except the newest `KEPT` and the one
        that is being copied. Later steps stay: the run abandoned them when it went back to an
        earlier step.

        Each host logs its own problems. Not collective.
        """
        if not self.leads:
            return
        found = tried(self.catalog.steps)
        if isinstance(found, HoldfastError):
            logger.warning("could not look for checkpoints to delete: %s", found)
            return
        ours = [other for other in found if other <= step]
        for old in ours[:-KEPT]:
            if old != self.draining:
                self._remover.set_aside(old)
        self._remover.start()

    def wait(self) -> None:
        """Wait until the files of old checkpoints are deleted."""
        self._remover.wait()

    def _copies(self, sizes: Sequence[int], attempt: HiddenFolder) -> list[Transfer]:
        """Return the transfers that copy the data files of each host to the next host.

        There are none without replicas. `sizes`: size of the data file of each rank.
        """
        hosts = list(self.leaders)
        if not self._replicas or len(hosts) == 1:
            return []
        ranks_of = {host: [r for r, h in enumerate(self.hosts) if h == host] for host in hosts}
        by_turn: list[tuple[int, int, int, Transfer]] = []
        for number, host in enumerate(hosts):
            others = ranks_of[hosts[(number + 1) % len(hosts)]]
            for place, rank in enumerate(ranks_of[host]):
                if sizes[rank]:
                    key, target = f"{attempt}/{data_file(rank)}", others[place % len(others)]
                    item = Transfer(key, key, sizes[rank], [(0, sizes[rank])], rank, target)
                    # Every second host sends while the others receive.
                    by_turn.append((place, number % 2, number, item))
        return [item for *_, item in sorted(by_turn, key=lambda turn: turn[:3])]

    def _write_index(self, attempt: HiddenFolder, files: dict[str, bytes]) -> None:
        if self.leads:
            write_index(attempt, {name: [data] for name, data in files.items()}, self.catalog.store)

    def _publish(self, attempt: HiddenFolder) -> None:
        if self.leads:
            self.catalog.publish(attempt)
            self.catalog.clean_up(attempt.name)
