"""A file that is written part by part equals one that is written from a snapshot."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.region import Region
from holdfast.planning.file_layout import TensorItem, lay_out, lay_out_file
from holdfast.saving.stage import Snapshot, host_windows
from holdfast.saving.write import WINDOW_BYTES, write
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore

NUM_ELEMENTS = [0, 1, 1000, WINDOW_BYTES // 4 - 1, WINDOW_BYTES // 4, WINDOW_BYTES // 2 + 7]
"""Sizes of tensors: empty, small, about one window, and about two."""


@given(
    st.lists(st.sampled_from(NUM_ELEMENTS), max_size=4),
    st.lists(st.binary(max_size=5000), max_size=3),
    st.booleans(),
)
def test_a_file_from_a_snapshot_equals_one_written_part_by_part(
    sizes: list[int], containers: list[bytes], local: bool
) -> None:
    """G1, G6. Method: compare the bytes of the files and the write results. The snapshot reuses
    memory that had another file."""
    tensors = {f"w{n}": torch.rand(size) for n, size in enumerate(sizes)}
    items = lay_out([(n, "float32", Region.whole(t.shape)) for n, t in tensors.items()])
    layout = lay_out_file(0, items, [([f"v{n}"], value) for n, value in enumerate(containers)])

    def tensor_of(item: TensorItem) -> torch.Tensor:
        return tensors[item.name]

    snapshot = Snapshot()
    snapshot.reserve(layout.nbytes + 1000)
    snapshot.memory(layout.nbytes + 1000)[:] = b"\xaa" * (layout.nbytes + 1000)
    snapshot.copy(items, tensor_of)
    with TemporaryDirectory() as folder:
        store = LocalStore(Path(folder)) if local else MemoryStore()
        results = []
        for name, data in (
            ("parts", lambda item: host_windows(tensor_of(item), item.dtype)),
            ("memory", snapshot.memory(layout.nbytes)),
        ):
            store.make_folder(name)
            results.append(write(store, name, layout, data))
        assert results[0] == results[1]
        if layout.nbytes:
            parts, memory = (
                store.read(f"{name}/{layout.name}", 0, layout.nbytes)
                for name in ("parts", "memory")
            )
            assert len(parts) == layout.nbytes
            assert parts == memory
