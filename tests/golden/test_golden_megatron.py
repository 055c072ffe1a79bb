"""A checkpoint of Megatron, written once by `write_by_megatron.py`, is read from its parent."""

from __future__ import annotations

from pathlib import Path

import torch

import holdfast
from golden.write_by_megatron import BIAS, WEIGHT
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.storage.local import LocalStore

HERE = Path(__file__).parent


def test_a_checkpoint_of_megatron_is_joined(tmp_path: Path) -> None:
    """G10. Method: the folder of a run of two ranks of tensor parallelism. Its index has Megatron's
    plans of all ranks beside the positions of the tensors. It verifies."""
    convert(plan(str(HERE / "megatron"), ConvertOptions("dcp")), str(tmp_path / "step-7"))
    checkpoint = holdfast.open(tmp_path / "step-7")
    assert {*checkpoint.tensors} == {"decoder.layers.0.weight", "decoder.bias"}
    assert torch.equal(checkpoint.read("decoder.layers.0.weight"), WEIGHT)
    assert torch.equal(checkpoint.read("decoder.bias"), BIAS)
    assert verify(VerifyTarget(LocalStore(HERE), "megatron")).good
