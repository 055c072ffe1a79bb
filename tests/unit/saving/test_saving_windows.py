"""Host windows of tensors that cannot be written as a view: cast, strided, conjugated."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from direct_files import copies, skip_without_direct
from holdfast.format.region import Region
from holdfast.format.torchzip import PAGE_BYTES, PHASE_BYTES
from holdfast.planning.file_layout import lay_out, lay_out_file
from holdfast.saving import stage
from holdfast.saving.stage import host_bytes, host_windows
from holdfast.saving.write import WINDOW_BYTES, write
from holdfast.state.layout import box_of
from holdfast.storage.direct import IN_PLACE_BYTES_MIN, huge_memory
from holdfast.storage.local import LocalStore
from holdfast.storage.store import Buffer, FileWriter
from memory import extra_mib

LIMIT_MIB = 64

CASTS = [
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float64", "float16"),
    ("complex64", "complex64"),
    ("int64", "int64"),
    ("bool", "bool"),
]
"""Dtype of the tensor, and dtype that is stored."""

PREPARED = """
import torch
from holdfast.catalog.catalog import Catalog
from holdfast.saving.planner import Planner
from holdfast.comm import Solo
from holdfast.saving.save import begin_save, finish_save
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

def save(name, tensor):
    catalog, leaves = Catalog(LocalStore(sys.argv[1])), StateTree({"weight": tensor}).flatten()
    finish_save(begin_save(catalog, name, leaves, planner=Planner(Solo()), dtype=dtype), Solo())

dtype = getattr(torch, sys.argv[2])
save("step-1", torch.ones(3000, 1000).t())
weight = torch.ones(7000, 8000)
"""

MEASURED = """
save("step-2", weight if dtype == torch.bfloat16 else weight.t())
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_save_makes_no_copy_of_a_whole_tensor(dtype: str, tmp_path: Path) -> None:
    """G13. Method: a save of 214 MiB, cast or transposed, takes at most 64 MiB more: peak resident
    memory of a separate process."""
    assert extra_mib(PREPARED, MEASURED, tmp_path, dtype) < LIMIT_MIB


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    window_bytes=st.sampled_from([16, 32, 48, 112, 1 << 20]),
    dtypes=st.sampled_from(CASTS),
    data=st.data(),
)
def test_windows_join_to_the_bytes_of_the_whole_tensor(
    shape: list[int], window_bytes: int, dtypes: tuple[str, str], data: st.DataObject
) -> None:
    """Method: any box with any strides against one copy of it; each window but the last is full."""
    order = data.draw(st.permutations(range(len(shape))))
    has, wanted = getattr(torch, dtypes[0]), dtypes[1]
    tensor = torch.randn(shape, dtype=torch.complex64).conj()
    tensor = (tensor if has.is_complex else tensor.real.to(has)).permute(order)
    start = tuple(data.draw(st.integers(0, size)) for size in tensor.shape)
    box = box_of(tensor, Region(start, tuple(tensor.shape)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "WINDOW_BYTES", window_bytes)
        windows = [bytes(window) for window in host_windows(box, wanted)]
    assert b"".join(windows) == bytes(host_bytes(box, wanted))
    if len(windows) > 1:
        assert {len(window) for window in windows[:-1]} == {window_bytes}


def at_phase(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a random tensor that starts 64 bytes after the start of a page, as glibc does."""
    count = prod(shape)
    memory = huge_memory(PHASE_BYTES + count * dtype.itemsize)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=PHASE_BYTES).view(shape)
    return tensor.copy_(torch.randn(shape))


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [
        pytest.param(at_phase((3, 1 << 20), torch.float32), "float32", id="plain"),
        pytest.param(torch.randn(3, 1 << 20), "bfloat16", id="cast"),
        pytest.param(torch.randn(1 << 20, 3).t(), "float32", id="strided"),
    ],
)
def test_a_large_tensor_is_written_without_a_copy_to_the_windows_of_the_store(
    tensor: torch.Tensor, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G13. Method: a tensor after a small one; the bytes that the store copies are counted."""
    skip_without_direct(tmp_path)
    copied = copies(monkeypatch)
    tensors = {"small": torch.randn(5), "large": tensor}
    regions = [
        (name, "float32" if name == "small" else stored, Region.whole(tuple(t.shape)))
        for name, t in tensors.items()
    ]
    layout = lay_out_file(0, lay_out(regions), [])
    write(
        LocalStore(tmp_path),
        ".",
        layout,
        lambda item: host_windows(tensors[item.name], item.dtype),
    )
    item = layout.tensors[1]
    assert 0 < sum(copied) <= 4 * PAGE_BYTES * -(-item.nbytes // WINDOW_BYTES)
    written = (tmp_path / layout.name).read_bytes()[item.data_offset : item.data_stop]
    wanted = tensor.to(getattr(torch, stored)).contiguous()
    assert written == wanted.view(-1).view(torch.uint8).numpy().tobytes()


def test_small_tensors_are_joined_and_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: 3,000 tensors of 4 KiB around a large one; the bytes that the store copies are
    counted."""
    skip_without_direct(tmp_path)
    copied = copies(monkeypatch)
    tensors = {f"t{number}": torch.randn(1024) for number in range(3000)}
    tensors["t1500"] = at_phase((1 << 20,), torch.float32)
    layout = lay_out_file(
        0, lay_out([(n, "float32", Region.whole(tuple(t.shape))) for n, t in tensors.items()]), []
    )
    write(
        LocalStore(tmp_path), ".", layout, lambda item: host_windows(tensors[item.name], item.dtype)
    )
    # The store copies short parts: before the large tensor and at the end.
    assert sum(copied) <= 2 * IN_PLACE_BYTES_MIN + layout.nbytes // 50
    written = (tmp_path / layout.name).read_bytes()
    for item in layout.tensors:
        data = tensors[item.name].numpy().tobytes()
        assert written[item.offset : item.stop] == item.prefix + data + item.suffix


class SlowStore:
    """Store that reads every other window only when the file's context ends."""

    def __init__(self) -> None:
        self.file = bytearray()
        self._later: list[tuple[int, Sequence[Buffer]]] = []
        self._num_windows = 0

    @contextmanager
    def create(self, _: str, nbytes: int) -> Iterator[FileWriter]:
        self.file = bytearray(nbytes)
        yield self
        for offset, parts in self._later:
            self._put(offset, parts)

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        self._num_windows += 1
        if self._num_windows % 2:
            self._later.append((offset, parts))
        else:
            self._put(offset, parts)

    def _put(self, offset: int, parts: Sequence[Buffer]) -> None:
        data = b"".join(parts)
        self.file[offset : offset + len(data)] = data


@example(sizes=[], container=b"v", joined=64, memory=6000, window=500)
@example(sizes=[700] * 4, container=b"v", joined=5000, memory=6000, window=500)
@given(
    sizes=st.lists(st.integers(0, 700), max_size=60),
    container=st.binary(min_size=1, max_size=20),
    joined=st.sampled_from([64, 300, 5000]),
    memory=st.sampled_from([6000, 9000]),
    window=st.sampled_from([500, 2000, 1 << 20]),
)
def test_parts_of_any_size_are_written_in_order(
    sizes: list[int],
    container: bytes,
    joined: int,
    memory: int,
    window: int,
) -> None:
    """Method: tensors of random bytes, with little memory for joined parts, and a store that reads
    some windows at once and others last; the whole file."""
    tensors = {f"t{n}": torch.randint(256, (size,)).byte() for n, size in enumerate(sizes)}
    layout = lay_out_file(
        0,
        lay_out([(n, "uint8", Region.whole(tuple(t.shape))) for n, t in tensors.items()]),
        [(["v"], container)],
    )
    store = SlowStore()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("holdfast.saving.write.JOINED_BYTES_MAX", joined)
        patched.setattr("holdfast.saving.write.HUGE_PAGE_BYTES", memory)
        patched.setattr("holdfast.saving.write.WINDOW_BYTES", window)
        patched.setattr("holdfast.saving.write.huge_memory", lambda nbytes: mmap.mmap(-1, nbytes))
        write(store, ".", layout, lambda item: [tensors[item.name].numpy().data])
    parts = [i.prefix + tensors[i.name].numpy().tobytes() + i.suffix for i in layout.tensors]
    assert store.file[: layout.table_offset] == b"".join(parts) + container
