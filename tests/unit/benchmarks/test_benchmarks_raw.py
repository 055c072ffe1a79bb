"""Raw writes and reads move all bytes in each way, and the fastest way is taken."""

from __future__ import annotations

import mmap
import os
import random
import time
from pathlib import Path

import pytest
from benchmarks import raw
from benchmarks.raw import (
    WAYS,
    Way,
    fastest,
    raw_read,
    raw_read_direct,
    raw_write,
    raw_write_memory,
)

NBYTES = (3 << 20) + 4096


def test_the_way_of_the_least_time_is_taken() -> None:
    """Method: one way takes a tenth of the time of the others. Each runs twice, after `prepare`."""
    order: list[str] = []

    def run(way: Way) -> None:
        order.append("run")
        time.sleep(0.002 if way == WAYS[4] else 0.02)

    assert fastest(run, lambda: order.append("prepare")) == WAYS[4]
    assert order == ["prepare", "run"] * 2 * len(WAYS)


@pytest.mark.parametrize("way", [Way(1, 1 << 20), Way(2, 1 << 20), Way(4, 8 << 20)], ids=str)
def test_each_way_writes_and_reads_all_bytes(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the file repeats the window; targets of odd sizes get the bytes of their place, and
    reads past the cache are as many."""
    raw_write(tmp_path / "raw", NBYTES, way)
    window = bytes(raw._window()[: way.window_bytes])
    data = (tmp_path / "raw").read_bytes()
    assert data == (window * -(-NBYTES // len(window)))[:NBYTES]
    targets = [bytearray(n) for n in (1, (2 << 20) + 5, 7, NBYTES - (2 << 20) - 13)]
    raw_read(tmp_path / "raw", [memoryview(target) for target in targets], way)
    assert b"".join(targets) == data
    counts: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[mmap.mmap], offset: int) -> int:
        counts.append(preadv(file, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    raw_read_direct(tmp_path / "raw", NBYTES, way)
    assert sum(counts) == NBYTES


@pytest.mark.parametrize("way", [Way(1, 1 << 20), Way(4, 8 << 20)], ids=str)
def test_the_pages_of_memory_are_written_in_order(way: Way, tmp_path: Path) -> None:
    """Method: two parts of one buffer, which start and end inside pages."""
    memory = memoryview(mmap.mmap(-1, 6 << 20))
    memory[:] = random.Random(0).randbytes(len(memory))
    raw_write_memory(tmp_path / "raw", [memory[64 : NBYTES + 1], memory[8200:8300]], way)
    pages = memory[: NBYTES + 4096], memory[8192:12288]
    assert (tmp_path / "raw").read_bytes() == b"".join(pages)
