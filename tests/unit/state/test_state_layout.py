"""Tied tensors, and tensors that cannot be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.errors import UsageError
from holdfast.format.dtypes import BY_NAME
from holdfast.state.layout import Layouts, bytes_of, local_of, same_memory


def test_views_are_tied_only_if_they_have_the_same_elements(tmp_path: Path) -> None:
    """G6. Method: every kind of view of one tensor, saved together and read back: each equals the
    original, whether or not it was stored once with others."""
    base = torch.randn(4, 4, dtype=torch.complex64)
    state = {
        "base": base,
        "again": base,
        "view": base.view(4, 4),
        "transposed": base.T,
        "conjugate": base.conj(),
        "adjoint": base.mH,
        "imaginary": base.imag,
        "negative": base.conj().imag,
        "row": base[0],
        "flat": base.view(16),
        "bits": base.view(torch.int64),
        "expanded": base[0].expand(4, 4),
    }
    holdfast.save(tmp_path / "step-1", state)
    checkpoint = holdfast.open(tmp_path / "step-1")
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor.resolve_conj().resolve_neg()), name


def test_tied_tensors_are_stored_once_and_load_under_both_names(tmp_path: Path) -> None:
    """G6. Method: the same tensor under two names; the file contains it once, a load fills both."""
    tensor = torch.randn(1000)
    saved = holdfast.save(tmp_path / "step-1", {"a": tensor, "b": {"c": tensor}})
    assert tensor.nbytes < saved.nbytes < 2 * tensor.nbytes
    target: dict[str, Any] = {"a": torch.zeros(1000), "b": {"c": torch.zeros(1000)}}
    holdfast.load(tmp_path / "step-1", target)
    assert torch.equal(target["a"], tensor)
    assert torch.equal(target["b"]["c"], tensor)


def test_tensors_without_elements_are_never_tied() -> None:
    """G6. Method: two empty tensors; one with elements, compared with itself and with another view
    of its memory."""
    tensor = torch.randn(4, 4)
    assert not same_memory(torch.empty(0), torch.empty(0))
    assert same_memory(tensor, tensor.detach())
    others = (tensor.T, tensor[:2], tensor.view(16), tensor.view(torch.int32), tensor.clone())
    assert not any(same_memory(tensor, other) for other in others)


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_tensors_without_plain_elements_are_refused_by_name() -> None:
    """G7. Method: two sparse layouts, a quantized and a meta tensor."""
    dense = torch.eye(3)
    for tensor in (
        dense.to_sparse(),
        dense.to_sparse_csr(),
        torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        dense.to("meta"),
    ):
        with pytest.raises(UsageError, match="`the name`"):
            Layouts().of("the name", tensor, local_of(tensor))


@pytest.mark.parametrize("nbytes", [0, 4, 40, 76])
@pytest.mark.parametrize("first", [0, 10])
def test_views_of_freed_memory_are_refused(tmp_path: Path, nbytes: int, first: int) -> None:
    """G6. Method: a buffer of 20 elements, freed or shrunk to `nbytes`, and a view of it from
    element `first` on, in a list; saved, and loaded into."""
    holdfast.save(tmp_path / "good", {"l": [torch.ones(20)[first:]], "t": torch.ones(3)})
    buffer = torch.ones(20)
    state: dict[str, Any] = {"l": [buffer[first:]], "t": torch.zeros(3)}
    buffer.untyped_storage().resize_(nbytes)
    found = rf"`l\.0` has {20 - first} elements, .* freed: its storage has {nbytes} bytes"
    for call in (
        lambda: holdfast.save(tmp_path / "one", state),
        lambda: holdfast.load(tmp_path / "good", state),
    ):
        with pytest.raises(UsageError, match=f"{found}, expected 80"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert not state["t"].any()


def test_views_of_whole_memory_are_not_refused(tmp_path: Path) -> None:
    """G6. Method: views with an offset, strides, expanded or without elements, at the end of their
    memory; an empty tensor whose memory was freed."""
    base = torch.arange(12.0).view(3, 4)
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    state = {
        "row": base[2],
        "last": base[2, 3],
        "column": base[:, 3],
        "transposed": base.T,
        "expanded": base[2:].expand(5, 4),
        "steps": base.view(12)[3::4],
        "none": base[3:],
        "freed": freed[4:],
    }
    holdfast.save(tmp_path / "one", state)
    checkpoint = holdfast.open(tmp_path / "one")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_a_parameter_whose_memory_was_freed_is_refused_until_it_is_back(tmp_path: Path) -> None:
    """G6. Method: the memory is freed after a first save, so that the layout is known; then it
    comes back."""
    model = torch.nn.Linear(3, 3)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    with CheckpointManager(tmp_path, model=model, config=config) as manager:
        assert manager.save(1)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        storage = model.weight.data.untyped_storage()
        storage.resize_(0)
        torch.nn.init.zeros_(model.bias)
        for call in (lambda: manager.save(2), manager.load):
            with pytest.raises(UsageError, match="`weight` has 9 elements, but its memory was"):
                call()
        assert not model.bias.any()
        storage.resize_(9 * 4)
        assert manager.load()
        assert manager.save(3)
    checkpoint = holdfast.open(tmp_path / "step-3")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in saved.items())


def test_a_local_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """G6. Method: a DTensor whose local tensor has as many elements as its placement says, in
    another shape; then the right one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        whole = DTensor.from_local(torch.zeros(4, 3), DeviceMesh("cpu", [0]), [Shard(0)])
        right, wrong = (
            DTensor.from_local(
                torch.arange(12.0).view(shape),
                whole.device_mesh,
                [Shard(0)],
                shape=whole.shape,
                stride=whole.stride(),
            )
            for shape in ((4, 3), (3, 4))
        )
        with pytest.raises(UsageError, match=r"`w`: .* shape \[3, 4\], expected shape \[4, 3\]"):
            holdfast.save(tmp_path / "one", {"w": wrong})
        assert not [*tmp_path.iterdir()]
        holdfast.save(tmp_path / "one", {"w": right})
        with pytest.raises(UsageError, match=r"`w`: .* shape \[3, 4\], expected shape \[4, 3\]"):
            holdfast.load(tmp_path / "one", {"w": wrong})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", BY_NAME)
def test_the_bytes_of_a_tensor_are_its_memory(dtype: str) -> None:
    """G6. Method: tensors of 0 to 2 dims, one element of a strided tensor, and a slice, as bytes:
    equal to numpy's, and writable. They stay valid once nothing else refers to the tensor."""
    kind: torch.dtype = getattr(torch, dtype)
    numbers = torch.randint(0, 2, (4, 6 * kind.itemsize), dtype=torch.uint8).view(kind)
    for tensor in (numbers, numbers[1:3], numbers[0, 0], numbers[:1, ::2][:, :1], numbers[:0]):
        data = bytes_of(tensor)
        elements = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        assert bytes(data) == elements.numpy().tobytes()
        if len(data):
            data[0] ^= 1
            assert elements[0] == data[0]
    nbytes = 8 << 20
    data = bytes_of(torch.ones(nbytes, dtype=torch.uint8).view(kind))
    others = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(4)]
    assert bytes(data) == b"\1" * nbytes
    assert len(others) == 4
