"""Stock `torch.distributed.checkpoint` reads our checkpoints, and we read its."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from holdfast.catalog.source import Source
from holdfast.errors import DamagedError, HoldfastError
from holdfast.format.dtypes import BY_NAME
from holdfast.loading.checkpoint import Checkpoint
from holdfast.storage.memory import MemoryStore
from holdfast.testing.stores import put

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    flat = flat.view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), flat.numpy().tobytes()


def tensor_of(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor whose elements differ; a bool tensor has both true and false."""
    nbytes = int(torch.Size(shape).numel()) * BY_NAME[dtype].itemsize
    plain = (torch.arange(nbytes) * 37).to(torch.uint8)
    if dtype == "bool":
        plain &= 1
    return plain.view(getattr(torch, dtype)).view(shape)


def blank(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.zeros(tensor.numel() * tensor.itemsize, dtype=torch.uint8)
    return plain.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
def test_every_dtype_loads_bit_for_bit_from_and_to_stock(dtype: str, tmp_path: Path) -> None:
    """G10. Method: 0-d, empty and other shapes; ours read by stock `load`, stock's read by us, both
    by `dcp_to_torch_save`. Dtype, shape and every bit are compared."""
    state: dict[str, Any] = {
        "matrix": tensor_of(dtype, 5, 3),
        "number": tensor_of(dtype),
        "none": tensor_of(dtype, 0, 4),
        "deep": {"w": tensor_of(dtype, 2, 1, 3)},
    }
    expected = {n: bits(t) for n, t in state.items() if isinstance(t, torch.Tensor)}
    deep = bits(state["deep"]["w"])
    holdfast.save(tmp_path / "ours", state)
    stock_save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    for name in ("ours", "stock"):
        for load in (
            lambda target, path: stock_load(target, checkpoint_id=path, no_dist=True),
            lambda target, path: holdfast.load(path, target),
        ):
            target: dict[str, Any] = {n: blank(state[n]) for n in expected}
            target["deep"] = {"w": blank(state["deep"]["w"])}
            load(target, tmp_path / name)
            assert {n: bits(target[n]) for n in expected} == expected
            assert bits(target["deep"]["w"]) == deep
        dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}.pt")
        converted = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert {n: bits(converted[n]) for n in expected} == expected


def test_values_lists_and_models_load_from_and_to_stock(tmp_path: Path) -> None:
    """G10. Method: a module, an optimizer after a step, nested lists and plain values, saved by one
    and loaded by the other, in both directions."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        return net, optimizer

    net, _ = make()
    extra = {"list": [torch.ones(2), {"n": 1}], "plain": [1, 2.5, "x"], "tuple": (1, 2)}
    for name, save in (
        ("ours", lambda path, state: holdfast.save(path, state)),
        (
            "stock",
            lambda path, state: stock_save(
                {**state, "model": state["model"].state_dict()}, checkpoint_id=path, no_dist=True
            ),
        ),
    ):
        save(tmp_path / name, {"model": net, "extra": extra})
        for load in (
            lambda path, m, e: holdfast.load(path, {"model": m, "extra": e}),
            lambda path, m, e: _stock_load(path, m, e),
        ):
            other, _ = make()
            found: dict[str, Any] = {
                "list": [torch.zeros(2), {"n": 0}], "plain": None, "tuple": None
            }  # fmt: skip
            load(tmp_path / name, other, found)
            for key, value in net.state_dict().items():
                assert torch.equal(other.state_dict()[key], value), key
            assert torch.equal(found["list"][0], torch.ones(2))
            assert found["list"][1] == {"n": 1}
            assert (found["plain"], found["tuple"]) == ([1, 2.5, "x"], (1, 2))


def _stock_load(path: Path, model: nn.Module, extra: dict[str, Any]) -> None:
    state = {"model": model.state_dict(), "extra": extra}
    stock_load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])


STOCK: dict[str, torch.Tensor] = {
    "plain": torch.randn(6, 5),
    "transposed": torch.randn(6, 5).T,
    "part": torch.randn(9, 5)[2:6, 1:4],
    "expanded": torch.randn(5).expand(3, 5),
    "parameter": nn.Parameter(torch.randn(4, 4)),
    "half": torch.randn(7).to(torch.bfloat16),
}


def stock_source(path: Path) -> Source:
    """The stock checkpoint in a store whose bytes can be changed."""
    from holdfast.catalog.catalog import open_manifest

    store = MemoryStore()
    store.make_folder("step-1")
    for file in sorted(path.iterdir()):
        put(store, f"step-1/{file.name}", file.read_bytes())
    return Source(store, "step-1", open_manifest(store, "step-1"))


@settings(max_examples=60)
@given(st.data())
def test_any_region_of_a_stock_tensor_of_any_strides_is_read(data: st.DataObject) -> None:
    """G6, G10. Method: stock stores some tensors with their strides; any box of each is compared
    with slicing."""
    source = _kept_source()
    name = data.draw(st.sampled_from(sorted(STOCK)))
    tensor = STOCK[name].detach()
    box = tuple(
        slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in tensor.shape
    )
    assert bits(Checkpoint(source).read(name, box)) == bits(tensor[box])


_KEPT: list[Source] = []


def _kept_source() -> Source:
    """One stock checkpoint for all examples."""
    from tempfile import TemporaryDirectory

    if not _KEPT:
        with TemporaryDirectory() as folder:
            stock_save(dict(STOCK), checkpoint_id=Path(folder) / "step-1", no_dist=True)
            _KEPT.append(stock_source(Path(folder) / "step-1"))
    return _KEPT[0]


@pytest.mark.parametrize("name", sorted(STOCK))
def test_a_flipped_bit_of_a_stock_tensor_that_is_read_whole_is_found(
    name: str, tmp_path: Path
) -> None:
    """G3. Method: one bit in each byte of the tensor's item is flipped in turn. The load fails, or
    gives the saved elements if the byte does not matter; never other elements, as stock does. The
    bytes around the data are covered by the same check."""
    stock_save({name: STOCK[name]}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    source = stock_source(tmp_path / "step-1")
    expected = bits(Checkpoint(source).read(name))
    assert expected == bits(STOCK[name])
    assert isinstance(source.store, MemoryStore)
    data = source.store._file("step-1/__0_0.distcp")
    item = source.manifest.tensors[name].chunks[0].item
    found = 0
    for position in range(item.offset, item.stop):
        data[position] ^= 0x10
        try:
            read = bits(Checkpoint(source).read(name))
        except HoldfastError as error:
            found += isinstance(error, DamagedError)
        else:
            assert read == expected, f"byte {position} changed, and nobody saw it"
        data[position] ^= 0x10
    assert found >= STOCK[name].numel() * STOCK[name].itemsize * 0.9
