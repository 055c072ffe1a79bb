"""PEFT adapters: converted by the table of their base, or unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_folders import LLAMA, PEFT, hf_tensors, low_rank, save_adapter, save_folder
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.comm import all_ranks
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError, UsageError
from holdfast.hf.load import load_folder
from holdfast.loading.checkpoint import open_checkpoint
from holdfast.loading.load import load
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

LAYER = "model.layers.1"


def whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round, so that sums of products are exact in any order."""
    return {name: (tensor * 4).round() for name, tensor in tensors.items()}


BASE = whole_numbers(hf_tensors(LLAMA))

RANKS = {
    f"{LAYER}.self_attn.q_proj": 4,
    f"{LAYER}.self_attn.k_proj": 2,
    f"{LAYER}.self_attn.o_proj": 4,
    f"{LAYER}.mlp.down_proj": 4,
    "lm_head": 3,
}


def loaded(source: Path, target: Path, **options: Any) -> dict[str, Tensor]:
    """Convert to a checkpoint, and load it."""
    parsed = ConvertOptions("dcp", **options)
    convert(plan(str(source), parsed), str(target))
    entries = open_checkpoint(target).manifest.tensors
    state = {n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in entries.items()}
    load(target, state)
    return state


@pytest.mark.parametrize("names", ["meta", "titan"])
def test_a_converted_adapter_adds_the_same_to_a_converted_base(names: str, tmp_path: Path) -> None:
    """G10: permuted rows, factors of several ranks, and a weight trained in full. Method: the sum
    of base and adapter, converted, is exactly the sum of converted base and converted adapter."""
    tensors = whole_numbers(low_rank(BASE, RANKS))
    whole = f"{LAYER}.self_attn.v_proj.weight"
    merged = {**BASE, whole: BASE[whole] + 1}
    for name in RANKS:
        a, b = (tensors[f"{PEFT}{name}.lora_{factor}.weight"] for factor in "AB")
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + b @ a
    base = save_folder(tmp_path / "base", LLAMA, BASE)
    sums = save_folder(tmp_path / "sums", LLAMA, merged)
    peft = save_adapter(tmp_path / "peft", {**tensors, PEFT + whole: merged[whole]})
    wanted = loaded(sums, tmp_path / "step-1", names=names)
    found = loaded(base, tmp_path / "step-2", names=names)
    ours = loaded(peft, tmp_path / "step-3", names=names, hf_assets=str(base))
    assert len(ours) == len(tensors) + 1
    for name in [name for name in ours if ".lora_A." in name]:
        weight = name.replace(".lora_A", "")
        found[weight] = found[weight] + ours[name.replace("lora_A", "lora_B")] @ ours[name]
    found |= {name: tensor for name, tensor in ours.items() if "lora_" not in name}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_adapter_without_its_base_keeps_its_names(tmp_path: Path) -> None:
    """G10: the same tensors under the same names; folder and checkpoint verify."""
    tensors = whole_numbers(low_rank(BASE, RANKS))
    folder = save_adapter(tmp_path / "peft", tensors)
    found = loaded(folder, tmp_path / "step-1")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for name in ("peft", "step-1"):
        assert verify(VerifyTarget(LocalStore(tmp_path), name)).good


def test_an_adapter_of_another_kind_keeps_its_names_and_is_named(tmp_path: Path) -> None:
    """Method: IA3, whose tensors have PEFT's prefix, which is no wrapper's."""
    tensors = {f"{PEFT}{LAYER}.self_attn.q_proj.ia3_l": torch.ones(32, 1)}
    folder = save_adapter(tmp_path / "peft", tensors)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))
    planned = plan(str(folder), ConvertOptions("dcp"))
    assert {*planned.outputs} == {*tensors}
    assert "the `adapter_config.json` of this adapter, 'IA3', is not in" in planned.notes[0]
    assert "--rename" not in "".join(planned.notes)


def test_adapter_tensors_that_match_no_base_weight_are_listed(tmp_path: Path) -> None:
    """G6: an unknown layer, a single factor, one of another size, a tensor that is no factor."""
    tensors = whole_numbers(low_rank(BASE, RANKS))
    del tensors[f"{PEFT}lm_head.lora_B.weight"]
    tensors[f"{PEFT}{LAYER}.mlp.down_proj.lora_B.weight"] = torch.ones(5, 4)
    tensors[f"{PEFT}model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    tensors[f"{PEFT}{LAYER}.mlp.down_proj.lora_magnitude_vector"] = torch.ones(32)
    folder = save_adapter(tmp_path / "peft", tensors)
    base = save_folder(tmp_path / "base", LLAMA, BASE)
    with pytest.raises(MismatchError, match="4 differences") as raised:
        plan(str(folder), ConvertOptions("dcp", hf_assets=str(base)))
    for part in (
        "layers.7",
        "lora_magnitude_vector",
        "without",
        "[5, 4], expected by its base: [32",
    ):
        assert part in str(raised.value)


def test_an_adapter_is_refused_where_a_base_is_expected(tmp_path: Path) -> None:
    """G6: in an export, and as initial weights of a run."""
    folder = save_adapter(tmp_path / "peft", whole_numbers(low_rank(BASE, RANKS)))
    with pytest.raises(UsageError, match="`--to hf` writes a whole model"):
        plan(str(folder), ConvertOptions("hf"))
    ranks = all_ranks()
    with pytest.raises(UsageError, match="expected: a base model"):
        load_folder(str(folder), StateTree({"w": torch.ones(2)}), ranks=ranks, config=LLAMA)
    ranks.close()
