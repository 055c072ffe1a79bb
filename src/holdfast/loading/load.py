"""Load: match the state with the manifest, plan, read, and put what was read into the state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from holdfast.catalog.arguments import check_to_load
from holdfast.catalog.open_any import open_in
from holdfast.catalog.source import Source, read_value
from holdfast.comm import Ranks, all_ranks, gather_deduplicated, hosts_of, run_on_all
from holdfast.errors import HoldfastError, MismatchError
from holdfast.format.manifest import Manifest, TensorEntry, ValueEntry
from holdfast.loading.fit import fits, needs_check, unfit_line
from holdfast.loading.hints import HINT, hint_of_call
from holdfast.loading.items import Place
from holdfast.loading.opening import read_on_all
from holdfast.loading.read import Wanted, read_tensors
from holdfast.loading.replicas import read_shared
from holdfast.loading.shared_memory import Staged, conflicts, sharing_memory
from holdfast.planning.gc_pause import gc_paused
from holdfast.spelling import listed
from holdfast.state.layout import Layouts, local_of
from holdfast.state.match import MadeValues, Match
from holdfast.state.objects import StateTree
from holdfast.state.values import decode_value
from holdfast.timing import Spans
from holdfast.uncompiled import uncompiled

_LISTED_MAX = 50

logger: logging.Logger = logging.getLogger("holdfast")


@uncompiled
def load(path: str | os.PathLike[str], state: Any, *, strict: bool = True) -> Loaded:
    """Load the checkpoint at `path` into `state`, in place: tensors are overwritten, objects get
    their state by `load_state_dict`, everything else is replaced. The layout may differ from that
    of the save.

    `state`: a dict of the components to load, or one module. Other top-level names of the
    checkpoint are ignored. Below the names given, dicts and modules must have the same entries as
    the checkpoint. With `strict=False` the checkpoint may have more entries, which are ignored, but
    every entry of `state` must be in it. Lists and the states of objects are replaced as a whole.

    Collective if `torch.distributed` is initialized: every rank calls this with its part of the
    state. An error of one rank is raised on all.

    Raises:
        UsageError: an argument has the wrong type.
        NotFoundError: there is no checkpoint at `path`.
        MismatchError: entries are missing, unexpected or of another shape, or whole numbers do not
            fit their dtype. All of them are listed, and nothing was changed. Or: an object rejects
            its state, or a number is too large for a smaller float dtype. Then the state is loaded
            in part.
        DamagedError: bytes differ from those that were saved. The state may be loaded in part.
        FormatError: the checkpoint holds a value that only running its code could read.
    """
    ranks = all_ranks()
    try:
        store, name = run_on_all(ranks, lambda: check_to_load(path, state, strict=strict))
        tree = run_on_all(ranks, lambda: StateTree(state))
        loaded = read_on_all(
            ranks,
            store,
            lambda: open_in(store, name),
            lambda opened: load_tree(
                opened.source(store), tree, ranks=ranks, strict=strict, hint_for=hint_of_call
            ),
        )
        for line in loaded.notes if ranks.rank == 0 else ():
            logger.warning("%s", line)
        return loaded
    finally:
        ranks.close()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of a load: what was read, and how the state differs from the checkpoint."""

    where: str
    nbytes: int
    """Bytes read by this rank."""

    converted: tuple[str, ...]
    """Names of tensors that have another dtype in the checkpoint than in the state."""

    spans: Spans

    differences: tuple[str, ...] = ()
    """One line per difference between checkpoint and state, over all ranks. Only a partial load
    allows differences."""

    notes: tuple[str, ...] = ()
    """One line per component that was not loaded exactly as saved, over all ranks, such as the
    state of another optimizer."""

    num_matched: int = 0
    """Number of entries that this rank has loaded."""

    lacking: tuple[str, ...] = ()
    """Names of this rank's tensors that the checkpoint lacks, which is allowed for some parameters
    of a model that is trained in part. These tensors are unchanged."""


Fill = Callable[[Source, Sequence[Wanted]], int]
"""`fill(source, wanted)`: reads the wanted tensors into memory. Returns the bytes read."""

Fetch = Callable[[Source, Sequence[Wanted], Iterable[ValueEntry]], object]
"""`fetch(source, wanted, values)`: is called before the reads, and makes available what this rank
will read: the data of `wanted` and of `values`. Collective."""

HintFor = Callable[[Manifest, Sequence[str], Sequence[str]], str]
"""`hint_for(manifest, missing, extra)` returns the hint for a state that does not fit. `missing`:
names of the state's entries that do not fit. `extra`: names that only the checkpoint has."""

Replicas = Literal["auto", "read", "broadcast"]
"""How several ranks get the same data, or different columns of the same rows. `read`: each rank
reads it. `broadcast`: one rank reads and checks it and sends each rank what it wants, so no byte is
read twice. `auto`: `broadcast` if the checkpoint is behind a URL or the ranks are on several hosts,
since with `read` each rank would fetch the data over the network. Ranks of one host share its page
cache, so for them `read` is faster than waiting for each other."""


def load_tree(
    source: Source,
    tree: StateTree,
    *,
    ranks: Ranks,
    strict: bool = True,
    partial: bool = False,
    fill: Fill | None = None,
    replicas: Replicas = "read",
    fetch: Fetch | None = None,
    hint_for: HintFor = lambda *_: HINT,
) -> Loaded:
    """Load an open checkpoint into the state `tree`.

    `partial`: state whose entries are missing or do not fit stays as it is, and is listed in
        `Loaded.differences`.
    `fill`: replaces `read_tensors`; then every rank reads for itself.
    `fetch`: called before the first read.
    `hint_for`: returns the hint for a state that does not fit. Called on rank 0.

    Collective: every rank calls this. An error of one rank is raised on all. Objects get their
    state only after every rank has read everything.
    """
    spans = Spans()
    # Tensors made inside of `torch.inference_mode` could not be trained.
    with torch.inference_mode(mode=False):
        with spans("plan"), gc_paused():
            match = run_on_all(ranks, lambda: tree.match(source.manifest, strict=strict))
            differences, notes, hint = _differences(match, ranks, hint_for)
            if differences and not partial:
                raise _mismatch(source, differences, hint)
            reading = run_on_all(ranks, lambda: _Reading(source, match))
        with spans("read"):
            if fetch is not None:
                fetch(source, [*reading.wanted.values()], [*reading.entries.values()])
            nbytes = _read(reading, ranks, fill, replicas)
            values = run_on_all(ranks, reading.values)
        with spans("apply"):
            reading.copy_staged()
            _apply(match, values, ranks)
    return Loaded(
        source.url,
        nbytes,
        converted=reading.converted(),
        spans=spans,
        differences=tuple(differences),
        notes=tuple(notes),
        num_matched=len(reading.wanted) + len(match.values),
        lacking=tuple(match.lacking),
    )


def _differences(match: Match, ranks: Ranks, hint_for: HintFor) -> tuple[list[str], list[str], str]:
    """Return two lists over all ranks: one line per difference between the checkpoint and the
    state, and the notes of each `match`. Return also the hint for the differences. An entry is
    unexpected only if no rank wants it, since each pipeline stage wants only its own layers.

    Collective.
    """
    own = {
        "lines": [*match.mismatches.values()],
        "missing": [*match.mismatches],
        "notes": [*match.notes],
        "extra": [*match.extra],
    }
    # These lists are nearly always equal on all ranks, or on all ranks of a pipeline stage. Equal
    # lists are sent once.
    reports = gather_deduplicated(ranks, own)
    lines: list[str] = []
    notes: list[str] = []
    hint = HINT
    if reports:
        distinct = {name: [*{id(r[name]): r[name] for r in reports}.values()] for name in own}
        lines = [*dict.fromkeys(line for one in distinct["lines"] for line in one)]
        notes = [*dict.fromkeys(line for one in distinct["notes"] for line in one)]
        common = set.intersection(*map(set, distinct["extra"]))
        extra = [name for name in reports[0]["extra"] if name in common]
        lines += [f"`{name}` is in the checkpoint, but not wanted" for name in extra]
        missing = [*dict.fromkeys(name for one in distinct["missing"] for name in one)]
        if lines:
            hint = hint_for(match.stored.manifest, missing, extra)
    return ranks.broadcast((lines, notes, hint))


def _mismatch(source: Source, lines: Sequence[str], hint: str = HINT) -> MismatchError:
    return MismatchError(
        f"`{source.url}` does not fit, {len(lines)} differences, nothing was changed:"
        + listed(lines, _LISTED_MAX),
        hint=hint,
    )


def _read(reading: _Reading, ranks: Ranks, fill: Fill | None, replicas: Replicas) -> int:
    """Fill the tensors of `reading`. Returns the bytes that this rank has read. Collective."""
    source, hosts = reading.source, hosts_of(ranks)
    num_local = hosts.count(hosts[ranks.rank])

    def read(wanted: Sequence[Wanted]) -> int:
        if fill is not None:
            return fill(source, wanted)
        return read_tensors(source, wanted, num_local=num_local)

    nbytes = 0
    if ranks.all_reduce_max([reading.has_checks])[0]:
        nbytes = run_on_all(ranks, lambda: reading.check(read))
    over_network = len({*hosts}) > 1 or "://" in source.store.url
    broadcast = replicas == "broadcast" or (replicas == "auto" and over_network)
    if ranks.size == 1 or fill is not None or not broadcast:
        return nbytes + run_on_all(ranks, lambda: read(reading.unchecked))
    num_shared, reading.containers = read_shared(
        source, reading.unchecked, reading.entries, ranks, num_local
    )
    return nbytes + num_shared


def _apply(match: Match, values: MadeValues, ranks: Ranks) -> None:
    """Put the loaded values into dicts and lists, and call `load_state_dict` of objects.
    Collective."""
    try:
        run_on_all(ranks, lambda: match.take(values))
    except HoldfastError as error:
        # The tensors have been overwritten, and some objects may already have their new state.
        error.what += "; the state is loaded in part"
        raise


class _Reading:
    """All tensors and values that this rank reads in one load."""

    @torch.no_grad()
    def __init__(self, source: Source, match: Match) -> None:
        self.source, self._match = source, match
        self._made = {name: make() for name, make in match.made.items()}
        tensors = source.manifest.tensors
        self._staged: dict[str, Staged] = {}
        self._narrowed: set[str] = set()
        self._sharing = sharing_memory(
            {name: local_of(tensor) for name, tensor in match.into.items()},
            lambda one, other: _is_stored_once(tensors[one], tensors[other]),
        )
        sharing = {name for group in self._sharing for name in group}
        self._decoded: dict[Place, Any] = {}
        layouts = Layouts()
        self.wanted: dict[str, Wanted] = {}
        for name, tensor in {**match.into, **self._made}.items():
            local = local_of(tensor).detach()
            pieces = layouts.of(name, tensor, local).pieces
            stored: torch.dtype = getattr(torch, tensors[name].dtype)
            narrowed = needs_check(stored, local.dtype)
            if narrowed or name in sharing:
                # The state must not change before all checks have passed.
                staged = torch.empty_strided(
                    local.shape, local.stride(), dtype=stored, device=local.device
                )
                self._staged[name] = (staged, local)
                local = staged
            if narrowed:
                self._narrowed.add(name)
            self.wanted[name] = Wanted(name, pieces, local)
        used = {name for names, _ in match.checks for name in names}
        self._read_first = {*self._staged, *(used & self._made.keys())}
        self.entries = {name: source.manifest.values[name] for name in match.values}
        self.containers: Mapping[Place, bytes] = {}

    @property
    def has_checks(self) -> bool:
        """Whether `check` must run before the state is changed."""
        return bool(self._staged or self._match.checks)

    def check(self, read: Callable[[Sequence[Wanted]], int]) -> int:
        """Read by `read` the entries that must be checked before the state changes, and check them.
        Return the number of bytes read. `read` returns it too.

        Raises:
            MismatchError: entries do not fit. The message lists all of them.
        """
        nbytes = read([want for name, want in self.wanted.items() if name in self._read_first])
        wrong = [
            unfit_line(name, local.dtype)
            for name, (staged, local) in self._staged.items()
            if name in self._narrowed and not fits(staged, local.dtype)
        ]
        for group in self._sharing:
            wrong += conflicts({name: self._staged[name] for name in group})
        checks = self._match.checks
        if checks:
            names = dict.fromkeys(name for names, _ in checks for name in names)
            values = self._made_values(name for name in names if name in self.entries)
            wrong += [line for _, check in checks if (line := check(values)) is not None]
        if wrong:
            raise _mismatch(self.source, wrong)
        return nbytes

    @property
    def unchecked(self) -> list[Wanted]:
        """Tensors that `check` does not read."""
        return [want for name, want in self.wanted.items() if name not in self._read_first]

    def values(self) -> MadeValues:
        """Decode all values. Reads their containers, except those that another rank has sent."""
        return self._made_values(self.entries)

    def _made_values(self, names: Iterable[str]) -> MadeValues:
        values: dict[str, Any] = {}
        for name in names:
            entry = self.entries[name]
            place = (entry.file, entry.item.offset)
            if place not in self._decoded:
                container = self.containers.get(place) or read_value(self.source, name, entry)
                where = f"{self.source.url}/{entry.file}"
                self._decoded[place] = decode_value(name, container, where=where)
            values[name] = self._decoded[place]
        return MadeValues(self._made, values)

    def copy_staged(self) -> None:
        """Copy the tensors that `check` has read into separate memory to the tensors of the
        state."""
        for staged, local in self._staged.values():
            local.copy_(staged)

    def converted(self) -> tuple[str, ...]:
        """Names of tensors that have another dtype in the checkpoint than in the state."""
        tensors = self.source.manifest.tensors
        return tuple(
            name
            for name, tensor in self._match.into.items()
            if str(tensor.dtype) != f"torch.{tensors[name].dtype}"
        )


def _is_stored_once(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two names belong to one tensor in the checkpoint."""
    return bool(one.chunks) and one.chunks == other.chunks
