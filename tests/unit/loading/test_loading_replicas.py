"""Loads in which one rank reads for others: the bytes read, and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast import comm as ranks_module
from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Ranks
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.manifest import Manifest
from holdfast.format.region import Region
from holdfast.loading.load import Replicas, load_tree
from holdfast.loading.read import Wanted, read_tensors, threads_for
from holdfast.state.objects import StateTree
from holdfast.state.shard import Piece
from holdfast.storage.local import LocalStore
from holdfast.storage.store import FileReader
from holdfast.testing.ranks import try_ranks

SIZE = 3


class CountingStore(LocalStore):
    """A folder that counts how often each byte is read. It calls `fail` first."""

    def __init__(self, root: Path, fail: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(root)
        self.fail = fail
        self.reads: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def open(self, key: str) -> Iterator[FileReader]:
        with super().open(key) as beneath:
            yield CountingReader(self, key, beneath)

    def read(self, key: str, start: int, stop: int) -> bytes:
        self.fail(key)
        self.reads.setdefault(key, []).append((start, stop))
        return super().read(key, start, stop)

    def times(self, folder: str, manifest: Manifest) -> set[int]:
        """How often bytes of tensors and values were read."""
        found: set[int] = set()
        counts = {file: np.zeros(nbytes + 1, int) for file, nbytes in manifest.files.items()}
        for file, count in counts.items():
            for start, stop in self.reads.get(f"{folder}/{file}", []):
                count[start : min(stop, len(count) - 1)] += 1
        for name, entry in manifest.tensors.items():
            for chunk in entry.chunks:
                assert chunk.data_offset is not None, name
                nbytes = chunk.region.num_elements * getattr(torch, entry.dtype).itemsize
                at = chunk.data_offset
                found |= {*counts[chunk.file][at : at + nbytes].tolist()}
        for value in manifest.values.values():
            found |= {*counts[value.file][value.item.offset : value.item.stop].tolist()}
        return found


class CountingReader:
    """FileReader of one of its files."""

    def __init__(self, store: CountingStore, key: str, beneath: FileReader) -> None:
        self._store, self._key, self._beneath = store, key, beneath

    def read_into(self, start: int, target: memoryview) -> int:
        self._store.fail(self._key)
        self._store.reads.setdefault(self._key, []).append((start, start + len(target)))
        return self._beneath.read_into(start, target)


class DistantStore(CountingStore):
    """The same folder, as if it were reached over a network."""

    request_bytes = 8 << 20


def state(fill: Callable[..., torch.Tensor] = torch.randn) -> dict[str, Any]:
    """A tensor of several bundles whose rows do not end at blocks, many small tensors, and
    values."""
    return {
        "large": fill(2703, 1003),
        "flat": fill(3 << 20),
        "small": {str(number): fill(number, 3) for number in range(40)},
        "seen": {"text": "hello" if fill is torch.randn else "", "count": 7},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, held = tmp_path_factory.mktemp("saved"), state()
    holdfast.save(folder / "step-1", held)
    return folder, held


def source_in(store: LocalStore) -> Source:
    return Source(store, "step-1", open_manifest(store, "step-1"))


def load_on_all(
    store: LocalStore, replicas: Replicas, size: int = SIZE
) -> list[tuple[int, dict[str, Any]] | BaseException]:
    """Bytes that each rank has read and its state after the load, or its error."""
    source = source_in(store)

    def work(ranks: Ranks) -> tuple[int, dict[str, Any]]:
        into = state(torch.zeros)
        loaded = load_tree(source, StateTree(into), ranks=ranks, replicas=replicas)
        return loaded.nbytes, into

    return try_ranks(size, work)


@pytest.mark.parametrize(("replicas", "times"), [("broadcast", 1), ("read", SIZE)])
def test_each_byte_is_read_by_one_rank_for_all(
    saved: tuple[Path, dict[str, Any]], replicas: Replicas, times: int
) -> None:
    """G6. Method: three ranks want the same; the store counts how often each byte of tensors and
    values is read. With `broadcast` each rank reads about a third."""
    store = CountingStore(saved[0])
    ends = load_on_all(store, replicas)
    assert store.times("step-1", open_manifest(store, "step-1")) == {times}
    for end in ends:
        assert not isinstance(end, BaseException), end
        nbytes, loaded = end
        for name in ("large", "flat"):
            assert torch.equal(loaded[name], saved[1][name])
        for name, tensor in saved[1]["small"].items():
            assert torch.equal(loaded["small"][name], tensor)
        assert loaded["seen"] == {"text": "hello", "count": 7}
        if replicas == "broadcast":
            assert abs(nbytes - 22.8e6 / SIZE) < 5e6


@pytest.mark.parametrize("kind", ["damage", "gone", "store"])
def test_an_error_of_the_reading_rank_ends_the_load_on_all(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """G3, G8. Method: a flipped bit, a missing file, a failing store, each met only by the rank
    that reads there; every rank raises that error."""
    folder = tmp_path / "step-1"
    folder.mkdir()
    for file in (saved[0] / "step-1").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (data,) = folder.glob("*.distcp")
    store = CountingStore(tmp_path)
    manifest = open_manifest(store, "step-1")
    if kind == "damage":
        damaged = bytearray(data.read_bytes())
        damaged[(manifest.tensors["large"].chunks[0].data_offset or 0) + (9 << 20)] ^= 1
        data.write_bytes(damaged)
    if kind == "gone":
        store.fail = lambda key: data.unlink(missing_ok=True) if data.name in key else None
    if kind == "store":

        def fail(key: str) -> None:
            if sum(map(len, store.reads.values())) > 10 and data.name in key:
                raise holdfast.StorageError("the mount is gone")

        store.fail = fail
    expected = {
        "damage": (holdfast.DamagedError, f"block {(9 << 20) // BLOCK_BYTES} of `large`"),
        "gone": (holdfast.DamagedError, data.name),
        "store": (holdfast.StorageError, "the mount is gone"),
    }
    for end in load_on_all(store, "broadcast"):
        assert isinstance(end, expected[kind][0])
        assert expected[kind][1] in str(end)


def test_an_error_of_one_rank_before_the_read_is_raised_on_all(
    saved: tuple[Path, dict[str, Any]],
) -> None:
    """G8. Method: one rank wants a tensor without plain elements."""
    source = Source(LocalStore(saved[0]), "step-1", open_manifest(LocalStore(saved[0]), "step-1"))

    def work(ranks: Ranks) -> None:
        into = state(torch.zeros)
        if ranks.rank == 1:
            into["flat"] = torch.zeros(3 << 20, device="meta")
        load_tree(source, StateTree(into), ranks=ranks, replicas="broadcast")

    for end in try_ranks(SIZE, work):
        assert isinstance(end, holdfast.UsageError)
        assert "rank 1" in str(end) or "`flat` is a meta tensor" in str(end)


def test_auto_broadcasts_only_over_a_network(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: two ranks on one host, on two hosts, and behind a URL."""
    for far in ("", "host", "url"):
        store = CountingStore(saved[0])
        with monkeypatch.context() as patched:
            if far == "host":
                names = iter("ab")
                patched.setattr(ranks_module, "host_name", lambda names=names: next(names))
            if far == "url":
                patched.setattr(CountingStore, "url", "far://there")
            load_on_all(store, "auto", size=2)
        assert store.times("step-1", open_manifest(store, "step-1")) == {1 if far else 2}


def test_ranks_of_one_host_share_its_cores(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: hosts of 2, 8 and 64 cores; threads per rank for several numbers of ranks. A distant
    store takes more threads, as long as its requests are few."""
    for cores, num_local, threads in ((2, 1, 2), (2, 4, 1), (8, 4, 2), (64, 8, 4), (1, 1, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: {*range(n)})
        assert threads_for(num_local, source_in(CountingStore(saved[0]))) == threads
        assert threads_for(num_local, source_in(DistantStore(saved[0]))) == max(4, 16 // num_local)


def test_a_distant_store_is_asked_for_large_ranges(
    saved: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the ranges that are read of the largest tensor: those of a local file fit into the
    CPU cache, those of a distant store are whole requests."""
    for store, nbytes in ((CountingStore(saved[0]), 512 << 10), (DistantStore(saved[0]), 8 << 20)):
        source = source_in(store)
        wanted = torch.zeros_like(saved[1]["large"])
        whole = Region.whole(tuple(wanted.shape))
        read_tensors(source, [Wanted("large", [Piece(whole, whole)], wanted)])
        assert torch.equal(wanted, saved[1]["large"])
        ranges = store.reads[f"step-1/{source.manifest.tensors['large'].chunks[0].file}"]
        sizes = [stop - start for start, stop in ranges]
        assert max(sizes) == nbytes
        assert sizes.count(nbytes) == wanted.nbytes // nbytes
