"""Copy checkpoints from the fast tier to the folder of the run, in a thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from holdfast.catalog.catalog import Catalog, open_manifest, read_manifest
from holdfast.comm import Ranks, capture, gather_and_run, run_on_rank_0
from holdfast.errors import HoldfastError, StorageError
from holdfast.format.manifest import Manifest
from holdfast.format.names import INDEX_FILES, HiddenFolder, data_file, step_name
from holdfast.saving.background import Background, lower_priority
from holdfast.saving.save import check_space
from holdfast.saving.write import Pace
from holdfast.tier.local import LocalTier
from holdfast.tier.transfer import PIECE_BYTES
from holdfast.timing import Spans, Times, times_of

logger: logging.Logger = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Drained:
    """A checkpoint of the fast tier whose copy in the folder of the run is durable."""

    step: int
    where: str
    """Path or URL of the copy."""

    manifest: Manifest
    """Manifest without entries."""

    times: Times | None
    """Durations of the copy on all ranks; None on ranks other than 0."""


OnDrained = Callable[[Drained], object]
"""Function that every rank calls, in the thread that copies, once a copy is durable."""


class Drain:
    """Copies checkpoints from the fast tier to the folder of the run, one at a time. Each rank
    copies its own data file.

    Collective: every rank makes a `Drain` and calls its methods in the same order.
    """

    def __init__(
        self,
        tier: LocalTier,
        catalog: Catalog,
        ranks: Ranks,
        *,
        bytes_per_s: float | None,
        on_drained: OnDrained,
    ) -> None:
        """`catalog`: the checkpoints in the folder of the run. `ranks`: only for the collectives of
        the thread. `bytes_per_s`: limit on the bytes that this rank copies per second."""
        self._tier, self._catalog, self._ranks = tier, catalog, ranks
        self._bytes_per_s, self._on_drained = bytes_per_s, on_drained
        self._thread = Background()
        self._stops = False

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being copied."""
        return self._thread.busy

    @property
    def failed(self) -> bool:
        """Whether a copy has failed, and `wait` has not raised its error yet."""
        return self._thread.failed

    def start(self, step: int) -> None:
        """Start to copy a checkpoint that all hosts have published. No copy may be running."""
        self._stops = False
        self._tier.draining = step

        def run() -> None:
            try:
                outcome = capture(lambda: self._copy(step))
                if isinstance(outcome, HoldfastError) and not self._stops:
                    if self._ranks.rank == 0:
                        logger.error("step %d was not copied: %s", step, outcome)
                    raise outcome
            finally:
                self._tier.draining = None

        self._thread.start(run)

    def wait(self) -> None:
        """Wait until the copy in progress is durable. Raise the error of a failed copy, once."""
        self._thread.wait()

    def stop(self) -> None:
        """Give up the copy in progress and delete its attempt: a stopping run has a deadline."""
        self._stops = True
        with suppress(HoldfastError):
            self._thread.wait()

    def _copy(self, step: int) -> None:
        lower_priority()
        ranks, name, local = self._ranks, step_name(step), self._tier.catalog.store
        spans = Spans()

        def begin() -> HiddenFolder:
            check_space(self._catalog, name, read_manifest(local, name, entries=False).nbytes)
            return self._catalog.begin(name, replace=True)

        with spans("write"):
            attempt = run_on_rank_0(ranks, begin)
            copied = capture(lambda: self._copy_own_file(name, attempt))
        try:
            with spans("commit"):
                manifest = gather_and_run(ranks, copied, lambda _: self._publish(name, attempt))
        except BaseException:
            if ranks.rank == 0:
                self._catalog.abort(attempt)
            raise
        seconds = ranks.gather(spans.seconds)
        times = times_of(step, manifest.nbytes, seconds) if seconds else None
        self._on_drained(Drained(step, self._catalog.where(name), manifest, times))

    def _copy_own_file(self, name: str, attempt: HiddenFolder) -> None:
        manifest = read_manifest(self._tier.catalog.store, name, entries=False)
        file = data_file(self._ranks.rank)
        if file in manifest.files:
            self._copy_file(name, attempt, file, manifest.files[file])

    def _publish(self, name: str, attempt: HiddenFolder) -> Manifest:
        """Copy the index files, which every host has, and publish the attempt as `name`.

        Return the manifest, without entries. Called on rank 0.
        """
        source = self._tier.catalog.store
        stored = source.list(name)
        for file in (file for file in INDEX_FILES if file in stored):
            nbytes = source.size(f"{name}/{file}")
            self._copy_file(name, attempt, file, nbytes)
        # Check that rank 0 sees all files in full before it publishes the checkpoint.
        manifest = open_manifest(self._catalog.store, str(attempt), entries=False)
        self._catalog.publish(attempt)
        self._catalog.clean_up(name)
        return manifest

    def _copy_file(self, name: str, attempt: HiddenFolder, file: str, nbytes: int) -> None:
        source, target = self._tier.catalog.store, self._catalog.store
        pace = Pace(self._bytes_per_s)
        with target.create(f"{attempt}/{file}", nbytes) as writer:
            for start in range(0, nbytes, PIECE_BYTES):
                if self._stops:
                    raise StorageError("the copy was given up, since the run stops")
                stop = min(start + PIECE_BYTES, nbytes)
                piece = source.read(f"{name}/{file}", start, stop)
                if len(piece) != stop - start:
                    raise StorageError(
                        f"`{source.url}/{name}/{file}` ends at byte {start + len(piece)}"
                    )
                writer.write(start, [piece])
                pace.wait(len(piece))
