"""Every family is converted from transformers and back, and transformers opens the exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hf_models
from hf_folders import assert_same, tensors_in
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.loading.checkpoint import open_checkpoint


def converted(source: Path, target: Path, options: ConvertOptions) -> Path:
    convert(plan(str(source), options), str(target))
    return target


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_family_round_trips_with_the_same_bits_and_logits(name: str, tmp_path: Path) -> None:
    """G10. Method: convert a transformers model to a checkpoint. Export that to a folder of several
    files and, through a `.pt` file, to a folder with a single file."""
    model = hf_models.make(name)
    source = hf_models.save(model, tmp_path / "hf")
    step = converted(source, tmp_path / "seed/step-0", ConvertOptions(to="dcp"))
    assets = str(source)
    many = converted(
        step, tmp_path / "many", ConvertOptions(to="hf", hf_assets=assets, max_shard_bytes=20_000)
    )
    assert len([*many.glob("*.safetensors")]) > 1
    assert_same(tensors_in(source), tensors_in(many))
    assert torch.equal(hf_models.logits(model), hf_models.logits(hf_models.load(many)))

    file = converted(step, tmp_path / "all.pt", ConvertOptions(to="torch"))
    single = converted(file, tmp_path / "single", ConvertOptions(to="hf", hf_assets=assets))
    assert [one.name for one in single.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(tensors_in(source), tensors_in(single))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe", "deepseek-v3", "gpt-oss", "phi-3"])
def test_torchtitan_names_convert_back_without_change(name: str, tmp_path: Path) -> None:
    """Method: convert from Hugging Face to the names of TorchTitan 0.3, to Meta's names, and back
    from either."""
    source = hf_models.save(hf_models.make(name), tmp_path / "hf")
    titan = converted(source, tmp_path / "titan", ConvertOptions(to="dcp", names="titan"))
    meta = converted(titan, tmp_path / "meta", ConvertOptions(to="dcp", names="meta"))
    names = {*open_checkpoint(titan).tensors}
    assert ("layers.0.attention.qkv_linear.wq.weight" in names) != (name == "deepseek-v3")
    assert "lm_head.weight" in names
    assert "output.weight" in open_checkpoint(meta).tensors
    for step in (titan, meta):
        back = converted(
            step, tmp_path / f"back-{step.name}", ConvertOptions(to="hf", hf_assets=str(source))
        )
        assert_same(tensors_in(source), tensors_in(back))


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v3"])
def test_fused_experts_are_read_and_exported_one_by_one(name: str, tmp_path: Path) -> None:
    """Method: convert a folder with the tensor names that the model has in memory. Exports have the
    published names."""
    model = hf_models.make(name)
    published = hf_models.save(model, tmp_path / "hf")
    memory = hf_models.save(model, tmp_path / "memory", save_original_format=False)
    assert tensors_in(published).keys() != tensors_in(memory).keys()
    step = converted(memory, tmp_path / "seed/step-0", ConvertOptions(to="dcp"))
    back = converted(step, tmp_path / "back", ConvertOptions(to="hf", hf_assets=str(published)))
    assert_same(tensors_in(published), tensors_in(back))
    straight = converted(memory, tmp_path / "straight", ConvertOptions(to="hf"))
    assert_same(tensors_in(published), tensors_in(straight))


def test_an_export_passes_the_checks_of_loaders(tmp_path: Path) -> None:
    """Method: repeat the checks of vLLM and transformers: header, alignment, index, dtype, config,
    tokenizer, one name per tied tensor. Weights in other formats are not copied."""
    model = hf_models.make("llama-tied")
    source = hf_models.save(model, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "none-of-these"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / ".cache").write_bytes(b"")
    step = converted(source, tmp_path / "seed/step-0", ConvertOptions(to="dcp"))
    made = converted(
        step,
        tmp_path / "made",
        ConvertOptions(to="hf", hf_assets=str(source), dtype="bfloat16", max_shard_bytes=10_000),
    )
    index = json.loads((made / "model.safetensors.index.json").read_text())
    found = tensors_in(made)
    assert "lm_head.weight" not in found
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for file in made.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file.name for name in opened.keys())  # noqa: SIM118
    written = json.loads((made / "config.json").read_text())
    assert written.get("dtype", written.get("torch_dtype")) == "bfloat16"
    assert "quantization_config" not in written
    others = {file.name for file in made.iterdir() if "safetensors" not in file.name}
    copied = {"generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert others == {"config.json", *copied}
    wanted = {name: tensor.bfloat16() for name, tensor in tensors_in(source).items()}
    assert_same(wanted, found)
    assert hf_models.load(made, dtype="auto").dtype == torch.bfloat16


def test_a_router_correction_bias_stays_in_float32(tmp_path: Path) -> None:
    """Method: convert a DeepSeek model to a checkpoint in bfloat16 and back."""
    source = hf_models.save(hf_models.make("deepseek-v3"), tmp_path / "hf")
    step = converted(source, tmp_path / "seed/step-0", ConvertOptions(to="dcp", dtype="bfloat16"))
    back = converted(step, tmp_path / "back", ConvertOptions(to="hf", hf_assets=str(source)))
    dtypes = {name: tensor.dtype for name, tensor in tensors_in(back).items()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2)}
    assert {*dtypes.values()} == {torch.float32, torch.bfloat16}
