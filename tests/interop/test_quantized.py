"""Dequantization by Holdfast, compared with that of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_models
from hf_folders import LLAMA, converted, hf_tensors, save_folder
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import FormatError
from holdfast.loading.checkpoint import open_checkpoint

DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    **hf_models.LATENT,
    "num_hidden_layers": 2,
    "kv_lora_rank": 128,
    "v_head_dim": 32,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "vocab_size": 64,
    "quantization_config": {"quant_method": "mxfp4"},
}


def fp8_folder(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write an fp8 folder. Returns its path, and its tensors as transformers dequantizes them."""
    # Imported here, since each process of the tests imports this module.
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, wanted = hf_tensors(DEEPSEEK), {}
    made = torch.Generator().manual_seed(1)
    for name, tensor in [*tensors.items()]:
        if not name.endswith("proj.weight") or any(size % 128 for size in tensor.shape):
            tensors[name] = tensor.bfloat16()
            continue
        scale = torch.rand(tensor.shape[0] // 128, tensor.shape[1] // 128, generator=made) * 1e-3
        quantized = (tensor * 100).to(torch.float8_e4m3fn)
        wanted[name] = Fp8Dequantize(None)._dequantize_one(quantized, scale, torch.bfloat16)
        tensors[name], tensors[f"{name}_scale_inv"] = quantized, scale
    return save_folder(folder, DEEPSEEK, tensors), wanted


def test_fp8_in_blocks_is_detected_and_dequantized(tmp_path: Path) -> None:
    """Method: export a folder in DeepSeek's format in bfloat16, and convert it to a checkpoint and
    back."""
    source, wanted = fp8_folder(tmp_path / "hf")
    assert len(wanted) > 10
    notes = converted(source, tmp_path / "plain", ConvertOptions(to="hf"))
    assert f"{len(wanted)} quantized tensors are dequantized" in notes
    converted(source, tmp_path / "step-0", ConvertOptions(to="dcp"))
    assets = str(tmp_path / "plain")
    converted(tmp_path / "step-0", tmp_path / "back", ConvertOptions(to="hf", hf_assets=assets))
    from safetensors.torch import load_file

    for folder in ("plain", "back"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert not any(name.endswith("scale_inv") for name in found)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
        assert "quantization_config" not in (tmp_path / folder / "config.json").read_text()


def test_fp8_blocks_may_be_cut_by_the_edge_of_a_matrix(tmp_path: Path) -> None:
    """Method: dequantize a matrix of 200 x 300 with 2 x 3 factors, and compare with one factor per
    element."""
    config = {**DEEPSEEK, "hidden_size": 300, "intermediate_size": 200}
    tensors = {name: tensor.bfloat16() for name, tensor in hf_tensors(config).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    quantized = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    every = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    source = save_folder(
        tmp_path / "hf", config, {**tensors, name: quantized, f"{name}_scale_inv": scale}
    )
    converted(source, tmp_path / "step-0", ConvertOptions(to="dcp", dtype="float32"))
    found = open_checkpoint(tmp_path / "step-0").read("layers.0.feed_forward.w3.weight")
    assert torch.equal(found, quantized.float() * every)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_detected_and_dequantized(dtype: str, tmp_path: Path) -> None:
    """Method: convert random bytes as gpt-oss's blocks and scales, into either dtype."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = {name: tensor.bfloat16() for name, tensor in hf_tensors(GPT_OSS).items()}
    wanted = {}
    made = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, rows, width // 32, 16), generator=made, dtype=torch.uint8
        )
        scales = torch.randint(
            100, 150, (experts, rows, width // 32), generator=made, dtype=torch.uint8
        )
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    source = save_folder(tmp_path / "hf", GPT_OSS, tensors)
    options = ConvertOptions(to="dcp", dtype=dtype if dtype == "float32" else None)  # type: ignore[arg-type]
    notes = converted(source, tmp_path / "step-0", options)
    assert f"{len(wanted)} quantized tensors are dequantized" in notes
    checkpoint = open_checkpoint(tmp_path / "step-0")
    for ours, theirs in (("mlp1_weight", "gate_up_proj"), ("mlp2_weight", "down_proj")):
        found = checkpoint.read(f"layers.0.moe.experts.{ours}")
        assert torch.equal(found, wanted[f"model.layers.0.mlp.experts.{theirs}"].transpose(1, 2))


def test_an_unsupported_quantization_is_refused(tmp_path: Path) -> None:
    """Method: convert factors of the wrong shape, and fp8 without factors. Each error names the
    tensor."""
    source, wanted = fp8_folder(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    first, second = [*wanted][:2]
    tensors[f"{first}_scale_inv"] = torch.ones(1)
    del tensors[f"{second}_scale_inv"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(FormatError) as raised:
        plan(str(source), ConvertOptions(to="dcp"))
    assert f"`{first}` is" in str(raised.value)
    assert f"`{second}` is float8_e4m3fn, without" in str(raised.value)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_method_that_cannot_be_read_is_named_in_one_line(
    model_type: str, method: str, tmp_path: Path
) -> None:
    """G6: whether the family has a table or not. Weights that are declared quantized and are not
    are converted."""
    config = {**LLAMA, "model_type": model_type, "quantization_config": {"quant_method": method}}
    tensors = hf_tensors(LLAMA)
    plan(str(save_folder(tmp_path / "plain", config, tensors)), ConvertOptions(to="hf"))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    tensors[f"{name}_scale"] = torch.ones(48)
    folder = save_folder(tmp_path / "hf", config, tensors)
    with pytest.raises(FormatError) as raised:
        plan(str(folder), ConvertOptions(to="hf", skip=("*_scale",)))
    assert raised.value.what == (
        f"the weights are quantized by '{method}', which cannot be read: 1 tensors, such as "
        f"`{name}` int8"
    )


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "fbgemm_fp8", "modelopt"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (48,), (48, 1)], ids=str)
@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_fp8_with_a_factor_per_row_or_tensor_is_dequantized(
    method: str, shape: tuple[int, ...], end: str, tmp_path: Path
) -> None:
    """G10. Method: a family with a table, compared with the product in float32; factors of
    activations are left out, and the export is not called quantized."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = hf_tensors(LLAMA)
    quantized = tensors[name].to(torch.float8_e4m3fn)
    scale = torch.rand(shape)
    rows = scale.reshape(-1, 1) if shape else scale
    tensors |= {name: quantized, name + end: scale}
    tensors[name.replace("weight", "input_scale")] = torch.ones(())
    config = {**LLAMA, "quantization_config": {"quant_method": method}}
    folder = save_folder(tmp_path / "hf", config, tensors)
    notes = converted(folder, tmp_path / "plain", ConvertOptions("hf", dtype="float32"))
    assert "1 quantized tensors are dequantized" in notes
    found = load_file(tmp_path / "plain/model.safetensors")
    assert {*found} == {*hf_tensors(LLAMA)}
    assert torch.equal(found[name], quantized.float() * rows)
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()


def test_experts_in_one_tensor_are_dequantized_by_the_blocks_of_each(tmp_path: Path) -> None:
    """Method: a family without a table; blocks that the edge cuts, and a factor for every element
    for comparison. The export has no scales and is not called quantized."""
    scheme = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    config = {"model_type": "unknown", "text_config": {"quantization_config": scheme}}
    weight, factors = torch.randn(3, 40, 48), torch.rand(3, 3, 2) + 0.5
    tensors = {"experts.w": weight.to(torch.float8_e4m3fn), "experts.w_scale_inv": factors}
    folder = save_folder(tmp_path / "hf", config, tensors)
    notes = converted(folder, tmp_path / "back", ConvertOptions(to="hf", dtype="float32"))
    assert "1 quantized tensors are dequantized" in notes
    every = factors.repeat_interleave(16, 1)[:, :40].repeat_interleave(32, 2)[..., :48]
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == {"experts.w"}
    assert torch.equal(found["experts.w"], tensors["experts.w"].float() * every)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert "quantization_config" not in written["text_config"]
