"""Tied tensors, and tensors that cannot be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import UsageError
from holdfast.state.layout import Layouts, local_of, same_memory


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
