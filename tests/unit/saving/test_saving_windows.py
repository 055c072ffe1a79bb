"""Host windows of tensors that cannot be written as a view: cast, strided, conjugated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.format.region import Region
from holdfast.saving import stage
from holdfast.saving.stage import host_bytes, host_windows
from holdfast.state.layout import box_of
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
