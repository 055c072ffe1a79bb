"""Loads into tensors that share memory without being the same view."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import MismatchError


class Attention(nn.Module):
    """Projections in one tensor, and a view of the first as a parameter of its own."""

    def __init__(self, *, is_view: bool) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(6, 2))
        self.q = nn.Parameter(self.qkv.data[:2] if is_view else torch.randn(2, 2))


def test_views_that_differ_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    """G6. Method: two tensors are saved, which here are a tensor and a view of its first rows."""
    holdfast.save(tmp_path / "one", {"m": Attention(is_view=False)})
    target = Attention(is_view=True)
    before = target.qkv.detach().clone()
    with pytest.raises(MismatchError, match=r"`m\.q` and `m\.qkv` share elements here"):
        holdfast.load(tmp_path / "one", {"m": target})
    assert torch.equal(target.qkv, before)


def test_views_that_agree_in_the_checkpoint_are_loaded(tmp_path: Path) -> None:
    """G9. Method: the same module, saved with the view."""
    saved, target = Attention(is_view=True), Attention(is_view=True)
    holdfast.save(tmp_path / "one", {"m": saved})
    holdfast.load(tmp_path / "one", {"m": target})
    assert torch.equal(target.qkv, saved.qkv)
    assert torch.equal(target.q, saved.q)


def test_views_without_a_common_element_are_loaded(tmp_path: Path) -> None:
    """G9. Method: columns of one matrix, whose elements alternate in memory, in two dtypes, and
    parts of one buffer, one after the other."""
    saved = {name: torch.randn(4, 3) for name in ("left", "right")} | {"x": torch.randn(4, 2)}
    holdfast.save(tmp_path / "one", saved)
    matrix, bits = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int16)
    state = {"left": matrix[:, :3], "right": matrix[:, 3:], "x": bits.view(torch.bfloat16)}
    holdfast.load(tmp_path / "one", state)
    assert torch.equal(matrix, torch.cat((saved["left"], saved["right"]), dim=1))
    assert torch.equal(state["x"], saved["x"].bfloat16())


def test_a_tensor_and_its_transpose_are_compared_as_views(tmp_path: Path) -> None:
    """G6. Method: tied weights, of which one is the other's transpose here: the checkpoint stores
    them once, but they cannot both be loaded, unless the matrix is symmetric."""
    weight = torch.randn(3, 3)
    holdfast.save(tmp_path / "one", {"a": weight, "b": weight})
    square = torch.zeros(3, 3)
    with pytest.raises(
        MismatchError, match=r"`a` and `b` are one tensor here, and two that differ"
    ):
        holdfast.load(tmp_path / "one", {"a": square, "b": square.t()})
    assert not square.any()
    symmetric = weight + weight.t()
    holdfast.save(tmp_path / "two", {"a": symmetric, "b": symmetric})
    holdfast.load(tmp_path / "two", {"a": square, "b": square.t()})
    assert torch.equal(square, symmetric)


def test_complex_views_are_compared_by_their_values(tmp_path: Path) -> None:
    """G9. Method: a tensor and its conjugate, which share memory."""
    saved = torch.randn(3, dtype=torch.complex64)
    holdfast.save(tmp_path / "one", {"a": saved, "b": saved.conj()})
    target = torch.zeros(3, dtype=torch.complex64)
    holdfast.load(tmp_path / "one", {"a": target, "b": target.conj()})
    assert torch.equal(target, saved)
    with pytest.raises(MismatchError, match="differ in the checkpoint"):
        holdfast.load(tmp_path / "one", {"a": target, "b": target})
