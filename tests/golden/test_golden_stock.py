"""Checkpoints of earlier versions of torch, written once by `write_by_stock.py`, remain
readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from golden.write_by_stock import stock_state
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("stock-*"))


def test_the_oldest_and_later_versions_are_included() -> None:
    """Method: the folders; for torch 2.13 there is `stock`, which has more entries."""
    assert VERSIONS[0] == "stock-2.1.2"
    assert len(VERSIONS) >= 4


@pytest.mark.parametrize("name", VERSIONS)
def test_it_is_opened_and_verified_bit_for_bit(name: str) -> None:
    """G8, G10. Method: every entry, compared with the saved state. torch 2.1 stored dicts without
    tensors as one value, and had some classes in another module."""
    checkpoint = holdfast.open(HERE / name)
    loaded: dict[str, Any] = {n: checkpoint.read(n) for n in checkpoint.tensors}
    for n in checkpoint.manifest.values:
        value = checkpoint.value(n)
        parts = (
            {f"{n}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {}
        )
        loaded |= parts or {n: value}
    expected = {n: leaf.value for n, leaf in StateTree(stock_state()).flatten().leaves.items()}
    assert loaded.keys() == expected.keys()
    for n, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert loaded[n].dtype == value.dtype
            assert torch.equal(loaded[n], value), n
        else:
            assert loaded[n] == value, n
    assert verify(VerifyTarget(LocalStore(HERE), name)).good


@pytest.mark.parametrize("name", VERSIONS)
def test_its_tensors_load(name: str) -> None:
    """G10. Method: `holdfast.load` of the model."""
    state = {"model": {n: torch.zeros_like(t) for n, t in stock_state()["model"].items()}}
    holdfast.load(HERE / name, state)
    for n, tensor in stock_state()["model"].items():
        assert torch.equal(state["model"][n], tensor), n
