"""Checkpoints with PEFT adapters become folders of PEFT, or models with the adapters merged."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_models
import hub_classes
from extent import some
from hf_folders import assert_same, tensors_in
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import HoldfastError, MismatchError, UsageError
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager

# Not by `importorskip`: an import takes seconds in each process of the tests.
if find_spec("peft") is None:
    pytest.skip("not installed: peft", allow_module_level=True)

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "ranks by name": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "rank-stabilized": ("llama", {"target_modules": ["o_proj"], "use_rslora": True}),
    "a head trained in full": (
        "llama",
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    ),
    "transposed weights": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def base_of(name: str) -> Any:
    return hf_models.make(name) if name in hf_models.MODELS else hub_classes.build(name)


def adapted(kind: str, base: Path, **more: Any) -> Any:
    """Return a model of the base with a random adapter."""
    import peft

    name, values = KINDS[kind]
    model = base_of(name)
    with hf_models.quiet():
        model = model.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **values, **more}))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def saved(model: Any, folder: Path, **settings: Any) -> Path:
    config = CheckpointConfig(enable=True, interval=1, **settings)
    with CheckpointManager(folder, model=model, config=config) as manager:
        manager.save(1)
    return folder / "step-1"


def converted(source: Path, target: Path, **options: Any) -> tuple[str, ...]:
    planned = plan(str(source), ConvertOptions("hf", **options))
    convert(planned, str(target))
    return planned.notes


def logits(model: Any) -> Tensor:
    with torch.no_grad(), hf_models.quiet():
        found: Tensor = model(torch.arange(3, 19).view(2, 8)).logits
    return found


@pytest.mark.parametrize("kind", some([*KINDS], 2))
def test_a_checkpoint_becomes_a_peft_folder_or_a_merged_model(kind: str, tmp_path: Path) -> None:
    """G10. Method: save the model of a run with an adapter, whole and without its frozen base. The
    folder of PEFT has what `save_pretrained` writes, and gives the logits of the run on its base.
    Merged into the base in the checkpoint, or in a folder, it gives the logits of the run and those
    of `merge_and_unload`. So does the folder itself."""
    import peft

    base = hf_models.save(base_of(KINDS[kind][0]), tmp_path / "base")
    model = adapted(kind, base)
    with hf_models.quiet():
        model.save_pretrained(tmp_path / "peft")
    wanted, config = tensors_in(tmp_path / "peft"), str(tmp_path / "peft/adapter_config.json")
    whole = saved(model, tmp_path / "whole")
    part = saved(model, tmp_path / "part", save_frozen=False)
    for step in (whole, part):
        target = tmp_path / f"peft-{step.parent.name}"
        notes = converted(step, target, adapter_config=config)
        assert f"a folder of PEFT, for the base `{base}`: r is 4, lora_alpha 12" in notes
        assert any("tensors of the base" in note for note in notes) == (step == whole)
        assert_same(tensors_in(target), wanted)
        with hf_models.quiet():
            again = peft.PeftModel.from_pretrained(base_of_folder(kind, base), target).eval()
        assert torch.equal(logits(again), logits(model))
    merged = {
        "whole": (whole, {"adapter_config": config, "hf_assets": str(base)}),
        "part": (part, {"adapter_config": config, "hf_assets": str(base)}),
        "folder": (tmp_path / "peft", {"hf_assets": str(base)}),
    }
    with hf_models.quiet():
        expected = logits(model.merge_and_unload())
    for name, (source, options) in merged.items():
        notes = converted(source, tmp_path / f"merged-{name}", merge=True, **options)
        assert any(note.startswith("the adapter is merged into its base") for note in notes)
        found = base_of_folder(kind, tmp_path / f"merged-{name}")
        torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-6)


def base_of_folder(kind: str, folder: Path) -> Any:
    model = base_of(KINDS[kind][0])
    with hf_models.quiet():
        opened, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return opened.eval()


@pytest.mark.parametrize("names", ["meta", "titan"])
def test_native_names_of_an_adapter_become_those_of_peft(names: str, tmp_path: Path) -> None:
    """G10. Method: convert a folder of PEFT to a checkpoint with native names, and back."""
    base = hf_models.save(hf_models.make("llama"), tmp_path / "base")
    with hf_models.quiet():
        adapted("a head trained in full", base).save_pretrained(tmp_path / "peft")
    options = ConvertOptions("dcp", hf_assets=str(base), names=names)  # type: ignore[arg-type]
    convert(plan(str(tmp_path / "peft"), options), str(tmp_path / "step-0"))
    config = str(tmp_path / "peft")
    converted(tmp_path / "step-0", tmp_path / "back", adapter_config=config, hf_assets=str(base))
    assert_same(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "peft"))
    written = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert written == json.loads((tmp_path / "peft/adapter_config.json").read_text())
    with pytest.raises(UsageError, match="has native names, which need the base's sizes"):
        plan(str(tmp_path / "step-0"), ConvertOptions("hf", adapter_config=config))


def test_what_a_merge_lacks_is_named(tmp_path: Path) -> None:
    """G6: no configuration; no base; a base of another size; magnitudes of DoRA; two adapters;
    options without an adapter."""
    import peft

    base = hf_models.save(hf_models.make("llama"), tmp_path / "base")
    model = adapted("plain", base)
    with hf_models.quiet():
        model.save_pretrained(tmp_path / "peft")
    config = str(tmp_path / "peft/adapter_config.json")
    part = saved(model, tmp_path / "part", save_frozen=False)

    def refused(source: Path, kind: type[HoldfastError] = UsageError, **options: Any) -> str:
        with pytest.raises(kind) as raised:
            plan(str(source), ConvertOptions("hf", **options))
        return str(raised.value)

    assert "--adapter-config FILE" in refused(part)
    assert f"name of the base: `{base}`" in refused(part, merge=True, adapter_config=config)
    wide = hf_models.save(hf_models.make("llama-tied"), tmp_path / "wide")
    options = {"merge": True, "adapter_config": config, "hf_assets": str(wide)}
    message = refused(part, MismatchError, **options)
    assert "cannot be merged, 2 reasons" in message
    assert "self_attn.q_proj.weight` is [64, 32], its factors [32, 4] x [4, 32]" in message
    with hf_models.quiet():
        dora = adapted("plain", base, use_dora=True)
        dora.save_pretrained(tmp_path / "dora")
    message = refused(tmp_path / "dora", MismatchError, merge=True, hf_assets=str(base))
    assert "`use_dora` is True, which cannot be merged" in message
    whole = saved(dora, tmp_path / "whole-dora")
    converted(whole, tmp_path / "again", adapter_config=str(tmp_path / "dora"))
    assert_same(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "dora"))
    model.add_adapter("other", peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    two = saved(model, tmp_path / "two")
    assert "has several adapters: default, other" in refused(two, adapter_config=config)
    skip = ("*.other.*",)
    converted(two, tmp_path / "one", adapter_config=config, skip=skip)
    assert_same(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "peft"))
    assert "has no adapters to export" in refused(base, merge=True)
    with pytest.raises(UsageError, match="needs `--to hf`"):
        plan(str(tmp_path / "peft"), ConvertOptions("dcp", merge=True))


def test_the_scale_of_merged_factors_is_that_of_peft(tmp_path: Path) -> None:
    """Method: a merged weight, computed from factors and configuration alone."""
    base = hf_models.save(hf_models.make("llama"), tmp_path / "base")
    model = adapted("rank-stabilized", base)
    with hf_models.quiet():
        model.save_pretrained(tmp_path / "peft")
    converted(tmp_path / "peft", tmp_path / "merged", merge=True, hf_assets=str(base))
    name = "model.layers.1.self_attn.o_proj"
    factors, weights = tensors_in(tmp_path / "peft"), tensors_in(tmp_path / "merged")
    a, b = (factors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    wanted = tensors_in(base)[f"{name}.weight"] + 12 / math.sqrt(4) * (b @ a)
    torch.testing.assert_close(weights[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6)
