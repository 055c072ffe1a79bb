"""Find the checkpoints that the hosts have together, and load from them.

Each host reports the manifests and files that it has. Files are combined only if their manifests
are equal, so files of two attempts at the same step are never mixed. If a host needs parts of data
files that it does not have, another host sends them. These parts are written to an attempt, which
is deleted after the load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field

from holdfast.catalog.catalog import Catalog, read_index, read_manifest
from holdfast.catalog.findings import why_not_resumable
from holdfast.catalog.marks import damaged_steps
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, capture, gather_and_run, run_on_rank_0
from holdfast.errors import HoldfastError
from holdfast.format.checksum import checksum
from holdfast.format.manifest import Manifest, ValueEntry
from holdfast.format.names import INDEX_FILES, MANIFEST, ROWS, HiddenFolder, step_name
from holdfast.loading.read import Wanted
from holdfast.planning.read_plan import read_items
from holdfast.storage.store import FileReader, ReadStore
from holdfast.tier.local import LocalTier
from holdfast.tier.transfer import Range, Transfer, transfer

GAP_BYTES_MAX = 1 << 20
"""Two ranges of a file with at most this many bytes between them are fetched as one range, which
includes these bytes. A load needs them too, since it reads ranges that are near as one."""


@dataclass(frozen=True, slots=True)
class HostPart:
    """The part of a checkpoint that is on one host."""

    step: int
    digest: int
    """Checksum of the manifest, which differs between attempts at the same step."""

    created: str
    """Time of the commit: ISO 8601, UTC."""

    files: Mapping[str, int]
    """Size of each file that the host has in full, index files included."""

    missing: frozenset[str]
    """Data files that the manifest lists, but that the host does not have in full."""


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A local checkpoint of which the hosts together have all files."""

    step: int
    created: str
    """Time of the commit: ISO 8601, UTC."""

    files: Mapping[str, int]
    """Size of each file."""

    ranks: Mapping[str, tuple[int, ...]]
    """For each file, the lowest rank of each host that has the file."""


def find(tier: LocalTier, ranks: Ranks) -> list[LocalCheckpoint]:
    """Return the local checkpoints of which the hosts together have all files, newest first.

    Only full checkpoints, from which a run can resume, are returned. The result is the same on all
    ranks. Collective: every rank calls this.
    """
    parts = ranks.gather(list(_parts(tier.catalog)) if tier.leads else [])
    return ranks.broadcast(combine(parts))


def combine(parts: Sequence[Sequence[HostPart]]) -> list[LocalCheckpoint]:
    """Return the checkpoints of which the hosts together have all files, newest first.

    `parts`: for each rank, the parts of checkpoints that the rank reports for its host.
    """
    groups: dict[tuple[int, str, int], list[tuple[int, HostPart]]] = {}
    for rank, reported in enumerate(parts):
        for part in reported:
            groups.setdefault((part.step, part.created, part.digest), []).append((rank, part))
    found = []
    for (step, created, _), group in sorted(groups.items(), reverse=True):
        sizes: dict[str, int] = {}
        owners: dict[str, tuple[int, ...]] = {}
        for rank, part in group:
            sizes |= part.files
            for file in part.files:
                owners[file] = (*owners.get(file, ()), rank)
        # Each host lacks files. The checkpoint is complete if every such file is on another host.
        if all(part.missing <= owners.keys() for _, part in group):
            found.append(LocalCheckpoint(step, created, sizes, owners))
    return found


def _parts(catalog: Catalog) -> Iterator[HostPart]:
    """For each checkpoint, yield the part that is on this host.

    Leave out checkpoints that are marked as damaged, that cannot be read, or that no run can resume
    from.
    """
    try:
        folders, damaged = catalog.folders(), damaged_steps(catalog.store)
    except HoldfastError:
        return
    for step in folders.keys() - damaged.keys():
        with suppress(HoldfastError):
            part = _part(catalog.store, step, folders[step])
            if part is not None:
                yield part


def _part(store: ReadStore, step: int, folder: str) -> HostPart | None:
    digest = checksum(read_index(store, f"{folder}/{MANIFEST}"))
    manifest = read_manifest(store, folder, entries=False)
    if why_not_resumable(step, manifest):
        return None
    listed = [file for file in store.list(folder) if not file.endswith("/")]
    sizes = {file: store.size(f"{folder}/{file}") for file in listed}
    expected = manifest.sizes
    complete = {f: n for f, n in sizes.items() if expected.get(f, n) == n}
    missing = frozenset(expected.keys() - complete.keys())
    return HostPart(step, digest, manifest.created, complete, missing)


@dataclass(frozen=True, slots=True)
class UnionStore:
    """A `ReadStore` that shows the folder of a host as if it had all files of one checkpoint.

    It lists the names and sizes of the whole checkpoint. Only the files of this host, and the parts
    that were fetched from other hosts, can be read.
    """

    beneath: ReadStore
    folder: str
    """Folder of the checkpoint."""

    sizes: Mapping[str, int]
    fetched_to: str
    """Folder of the files that were fetched from other hosts."""

    fetched: set[str] = field(default_factory=set)
    """Names of the files that were fetched from other hosts, at least in part."""

    @property
    def url(self) -> str:
        return self.beneath.url

    def list(self, folder: str = "") -> Sequence[str]:
        if folder == self.folder:
            return sorted(self.sizes)
        names = {*self.beneath.list(folder)}
        if not folder:
            names.add(f"{self.folder}/")
        return sorted(names)

    def size(self, key: str) -> int:
        folder, _, file = key.rpartition("/")
        if folder == self.folder and file in self.sizes:
            return self.sizes[file]
        return self.beneath.size(key)

    def read(self, key: str, start: int, stop: int) -> bytes:
        return self.beneath.read(self._place(key), start, stop)

    def open(self, key: str) -> AbstractContextManager[FileReader]:
        return self.beneath.open(self._place(key))

    def leads_out(self, folder: str, file: str) -> bool:
        folder, _, file = self._place(f"{folder}/{file}").rpartition("/")
        return self.beneath.leads_out(folder, file)

    def _place(self, key: str) -> str:
        folder, _, file = key.rpartition("/")
        is_fetched = folder == self.folder and file in self.fetched
        return f"{self.fetched_to}/{file}" if is_fetched else key


class Fetching:
    """Local checkpoint of which this host may have only some files.

    What a load on this rank needs from other files is fetched from the hosts that have them.
    """

    def __init__(
        self, tier: LocalTier, found: LocalCheckpoint, ranks: Ranks, attempt: HiddenFolder
    ) -> None:
        self._tier, self._found, self._ranks = tier, found, ranks
        self._attempt = attempt
        self._leader = tier.leaders[tier.host]
        name = step_name(found.step)
        self.store: UnionStore = UnionStore(tier.catalog.store, name, found.files, str(attempt))

    def open(self) -> Opened:
        """Open the checkpoint on rank 0, and send its manifest to the other ranks. Collective."""
        # Rank 0 reads all index files. The others read only the rows of their own tensors.
        index = INDEX_FILES if self._ranks.rank == 0 else (ROWS,)
        self._fetch({f: [(0, n)] for f, n in self._found.files.items() if f in index})
        name = step_name(self._found.step)
        return run_on_rank_0(self._ranks, lambda: open_in(self.store, name))

    def fetch(self, source: Source, wanted: Sequence[Wanted], values: Iterable[ValueEntry]) -> None:
        """Fetch the data of `wanted` and `values` that this rank's host does not have. Collective.

        `wanted`: tensors that this rank will read. `values`: entries of values that it will read.
        """
        self._fetch(capture(lambda: _needed(source.manifest, wanted, values)))

    def _fetch(self, needed: Mapping[str, Sequence[Range]] | HoldfastError) -> None:
        owners, leader = self._found.ranks, self._leader
        if not isinstance(needed, HoldfastError):
            needed = {
                file: merged(ranges)
                for file, ranges in needed.items()
                if leader not in owners.get(file, (leader,))
            }
        plan = gather_and_run(self._ranks, needed, self._plan)
        transfer(plan, self._tier.catalog.store, self._ranks)
        # A rank can also read the files that were fetched by another rank of its host.
        here = [item for item in plan if self._tier.hosts[item.target] == self._tier.host]
        self.store.fetched.update(item.target_key.rpartition("/")[2] for item in here)

    def _plan(self, needed: Sequence[Mapping[str, Sequence[Range]]]) -> list[Transfer]:
        """Return the transfers of the ranges that each rank needs, given by file in `needed`.

        Each byte is sent once to each host that needs it. The hosts that have a file, and the ranks
        of each host, take turns to send. Called on rank 0.
        """
        hosts, found = self._tier.hosts, self._found
        targets: dict[tuple[str, str], tuple[int, list[Range]]] = {}
        for rank, by_file in enumerate(needed):
            for file, ranges in by_file.items():
                targets.setdefault((file, hosts[rank]), (rank, []))[1].extend(ranges)
        plan = []
        for number, ((file, _), (target, ranges)) in enumerate(sorted(targets.items())):
            owner = hosts[found.ranks[file][number % len(found.ranks[file])]]
            senders = [rank for rank, host in enumerate(hosts) if host == owner]
            source = senders[number % len(senders)]
            key, target_key = f"{step_name(found.step)}/{file}", f"{self._attempt}/{file}"
            plan.append(
                Transfer(key, target_key, found.files[file], merged(ranges), source, target)
            )
        return plan


def _needed(
    manifest: Manifest, wanted: Sequence[Wanted], values: Iterable[ValueEntry]
) -> dict[str, list[Range]]:
    """Return file -> ranges of bytes that hold the wanted tensors, the values and checksums."""
    needed: dict[str, list[Range]] = {}
    for want in wanted:
        entry = manifest.tensors[want.name]
        for piece in want.pieces:
            for item in read_items(want.name, entry, piece.region):
                span = item.chunk.item
                needed.setdefault(item.chunk.file, []).append((span.offset, span.stop))
    for value in values:
        needed.setdefault(value.file, []).append((value.item.offset, value.item.stop))
    for file, ranges in needed.items():
        if file in manifest.tables:
            ranges.append((manifest.tables[file].offset, manifest.files[file]))
    return needed


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Return the ranges in order. Merge those with at most `GAP_BYTES_MAX` bytes between them.

    >>> merged([(9, 12), (0, 4), (5_000_000, 5_000_001)])
    [(0, 12), (5000000, 5000001)]
    """
    result: list[Range] = []
    for start, stop in sorted(ranges):
        if result and start - result[-1][1] <= GAP_BYTES_MAX:
            result[-1] = (result[-1][0], max(result[-1][1], stop))
        else:
            result.append((start, stop))
    return result


@contextmanager
def fetching(tier: LocalTier, found: LocalCheckpoint, ranks: Ranks) -> Iterator[Fetching]:
    """Context in which a local checkpoint can be read of which this host may have only some files.

    Collective: every rank enters and leaves the context.
    """
    attempt = ranks.broadcast(tier.attempt(f"fetched-{found.step}"))
    try:
        tier.make_attempt(attempt, ranks)
        yield Fetching(tier, found, ranks, attempt)
    finally:
        tier.abort(attempt)
