"""The fast tier of a run: a folder on each host, and copies from there to the run's folder."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from holdfast.catalog.tier import claim_tier
from holdfast.comm import run_on_all, run_on_rank_0
from holdfast.errors import ExistsError
from holdfast.manager.context import RunContext
from holdfast.storage.opening import local_path
from holdfast.tier.drain import Drain, OnDrained
from holdfast.tier.local import LocalTier


class FastTier:
    """The fast tier of a run. Made after the run has locked its own folder.

    Collective: every rank makes one and calls its methods in the same order.
    """

    def __init__(
        self, run: RunContext, folder: str, held: ExitStack, note: str, on_drained: OnDrained
    ) -> None:
        """Lock `folder` on each host until the context `held` ends.

        `note` describes this process; it is written into the lock files. `on_drained` is called on
        every rank when a checkpoint was copied to the folder of the run.

        Raises:
            UsageError: `folder` is a URL.
            ExistsError: two hosts share `folder`, or another run uses it.
            StorageError: `folder` cannot be written on some host.
        """
        config, ranks = run.config, run.ranks
        path = run_on_all(ranks, partial(local_path, folder))
        record = run_on_rank_0(ranks, partial(claim_tier, run.catalog.store, path))
        self.local: LocalTier = LocalTier(record, ranks, replicas=config.local_replicas)
        try:
            run_on_all(ranks, partial(self.local.open, held, note))
        except ExistsError as error:
            error.hint = (
                "each host needs a folder of its own: in `checkpoint.local_folder`, the name of "
                "the host replaces `{host}`"
            )
            raise
        if config.local_replicas and len(self.local.leaders) == 1:
            run.warn("`checkpoint.local_replicas` has no effect: all ranks are on one host")
        self.drain: Drain = Drain(
            self.local,
            run.catalog,
            ranks.duplicate(),
            bytes_per_s=run.bytes_per_s,
            on_drained=on_drained,
        )
