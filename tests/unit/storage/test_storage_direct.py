"""Files written with `O_DIRECT` equal those written through the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_files import copies, skip_without_direct
from holdfast.errors import StorageError
from holdfast.storage.direct import (
    IN_PLACE_BYTES_MAX,
    IN_PLACE_BYTES_MIN,
    NUM_THREADS,
    PAGE_BYTES,
    WINDOW_BYTES,
    BufferedWriter,
    DirectWriter,
    open_direct,
)
from holdfast.storage.local import DIRECT_BYTES_MIN, LocalStore
from holdfast.storage.store import Buffer

BYTES = memoryview(mmap.mmap(-1, 3 * IN_PLACE_BYTES_MAX))
BYTES[:] = random.Random(0).randbytes(len(BYTES))

SIZES = st.sampled_from([0, 1, 100, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1]) | st.sampled_from(
    [
        IN_PLACE_BYTES_MIN,
        IN_PLACE_BYTES_MIN + PAGE_BYTES,
        WINDOW_BYTES - 1,
        WINDOW_BYTES + 70,
        IN_PLACE_BYTES_MAX + 70,
    ]
)

# Of parts of the same size, most have distinct bytes, at the same distance from a page.
STARTS = st.builds(
    lambda page, at: page * PAGE_BYTES + at, st.integers(0, 9), st.sampled_from([0, 64])
)


@pytest.fixture(scope="module", autouse=True)
def direct_or_skip(tmp_path_factory: pytest.TempPathFactory) -> None:
    skip_without_direct(tmp_path_factory.mktemp("direct"))


def write_file(path: Path, parts: Sequence[Buffer]) -> None:
    """Write a file as the store does, which takes it past the page cache if it is large."""
    with LocalStore(path.parent).create(path.name, sum(map(len, parts))) as writer:
        writer.write(0, parts)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 64]) | st.integers(0, 3 * PAGE_BYTES),
            st.lists(st.tuples(SIZES, STARTS), max_size=5),
        ),
        max_size=3,
    )
)
def test_direct_writes_give_the_same_file_as_buffered_ones(
    ranges: list[tuple[int, list[tuple[int, int]]]],
) -> None:
    """G1. Method: ranges with gaps between them, parts of sizes around that of a page, of a window
    and of a write without a copy, in aligned and unaligned memory; compared byte for byte with
    plain writes."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("direct", "plain")]
        files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
        direct = open_direct(str(paths[0]))
        assert direct is not None
        writer, plain = DirectWriter(direct, files[0]), BufferedWriter(files[1])
        offset = 0
        for gap, sizes in ranges:
            parts = [BYTES[at : at + size] for size, at in sizes]
            writer.write(offset + gap, parts)
            plain.write(offset + gap, parts)
            offset += gap + sum(map(len, parts))
        writer.finish()
        writer.close()
        assert paths[0].read_bytes() == paths[1].read_bytes()
        for file in (*files, direct):
            os.close(file)


@pytest.mark.parametrize("phase", [0, 64, 100])
def test_pages_of_large_tensors_are_written_without_a_copy(
    phase: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G13. Method: three large parts with small ones between them. In memory and in the file, the
    large ones start at the same distance from the start of a page. The copied bytes are counted."""
    copied = copies(monkeypatch)
    large = BYTES[phase : phase + 2 * IN_PLACE_BYTES_MAX + 3 * PAGE_BYTES + 5]
    small = BYTES[-(-len(large) % PAGE_BYTES) :]
    parts: list[Buffer] = [BYTES[:phase], large, small, large, small, large]
    write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert sum(copied) <= 3 * 3 * PAGE_BYTES


def test_memory_that_the_system_cannot_write_from_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1. Method: the system call fails as it does for memory of a device, after it has written a
    part."""
    pwritev = os.pwritev

    def failing(file: int, views: list[memoryview], offset: int) -> int:
        if not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            return pwritev(file, views, offset)
        if len(views[0]) > WINDOW_BYTES:
            raise OSError(errno.EFAULT, "Bad address")
        return pwritev(file, views[:1], offset)

    monkeypatch.setattr(os, "pwritev", failing)
    parts: list[Buffer] = [BYTES[:100], BYTES[100:], BYTES[:5000]]
    write_file(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_an_error_in_a_writing_thread_is_raised_to_the_caller(tmp_path: Path) -> None:
    """G7. Method: a file that is not open for writing; a write of many windows ends at the first
    error."""
    path = tmp_path / "file"
    path.touch()
    file = os.open(path, os.O_RDONLY)
    writer = DirectWriter(file, file)
    with pytest.raises(OSError, match="Bad file descriptor"):
        for number in range(20):
            writer.write(number * WINDOW_BYTES, [BYTES[64 : 64 + WINDOW_BYTES]])
    writer.close()
    os.close(file)


def test_a_large_file_of_the_store_has_its_exact_size_and_content(tmp_path: Path) -> None:
    """G1. Method: an odd number of bytes, large enough for direct writes."""
    store, nbytes = LocalStore(tmp_path), DIRECT_BYTES_MIN + 4321
    with store.create("file", nbytes) as writer:
        writer.write(0, [BYTES[:1000], BYTES[1000:nbytes]])
    assert store.size("file") == nbytes
    assert store.read("file", 0, nbytes) == BYTES[:nbytes]


@pytest.mark.parametrize("room_mib", [4, 20])
def test_fewer_threads_write_the_same_if_memory_is_short(tmp_path: Path, room_mib: int) -> None:
    """G13. Method: a limit of the address space with room for the stacks of few or no threads."""
    script = """
import mmap, os, random, re, resource, sys
from pathlib import Path
import numpy
from holdfast.storage import direct
files = [os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | flag) for flag in (os.O_DIRECT, 0)]
windows = [direct.huge_memory(direct.WINDOW_BYTES) for _ in range(direct.NUM_THREADS)]
data = memoryview(mmap.mmap(-1, 16 << 20))
data[:] = random.Random(0).randbytes(len(data))
direct.huge_memory = lambda nbytes: windows.pop()
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
size += int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
writer = direct.DirectWriter(*files)
num_threads = len(writer._threads._running)
writer.write(0, [data])
writer.finish()
writer.close()
print(num_threads)
"""
    file = tmp_path / "file"
    words = [sys.executable, "-c", script, str(file), str(room_mib)]
    ran = subprocess.run(words, text=True, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < NUM_THREADS
    assert file.read_bytes() == random.Random(0).randbytes(16 << 20)


def test_an_error_of_the_caller_ends_the_writing_threads(
    tmp_path: Path,
) -> None:
    """G7. Method: the caller's own error after some windows."""
    store = LocalStore(tmp_path)
    with pytest.raises(StorageError, match="mine"), store.create("file", 1 << 26) as writer:
        writer.write(0, [BYTES])
        raise StorageError("mine")
