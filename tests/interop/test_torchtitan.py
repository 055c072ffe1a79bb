"""Models of TorchTitan 0.3.0, in a separate environment."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hf_models
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.hf.published import published

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-torchtitan"
WANTED = ("torchtitan==0.3.0", "spmd_types==0.2.3", "triton", "einops")
"""Packages that TorchTitan's models import. Its other requirements are for training."""

SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 16,
    "vocab_size": 2048,
}
SMALL_V3 = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "q_lora_rank": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}
V3_SIZES = {
    "n_layers": 2,
    "n_dense_layers": 1,
    "dim": 256,
    "n_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mscale": 1.0,
    "dense_hidden_dim": 1024,
    "moe_hidden_dim": 128,
    "num_experts": 16,
    "num_shared_experts": 1,
    "router_top_k": 4,
    "router_score_func": "sigmoid",
    "router_route_norm": True,
    "router_num_expert_groups": 8,
    "router_num_limited_groups": 4,
    "router_route_scale": 2.5,
    "non_blocking_capacity_factor": None,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama3": ("llama3", "debugmodel", {**published("llama3", "8B", 0), **SMALL_LLAMA}, {}),
    "qwen3": ("qwen3", "debugmodel", published("qwen3", "debugmodel", 0), {}),
    "qwen3-moe": ("qwen3", "debugmodel_moe", published("qwen3", "debugmodel_moe", 0), {}),
    "deepseek-v2": ("deepseek_v3", "debugmodel", published("deepseek_v3", "debugmodel", 0), {}),
    "deepseek-v3": (
        "deepseek_v3",
        "debugmodel",
        {**published("deepseek_v3", "671B", 0), **SMALL_V3},
        V3_SIZES,
    ),
    "gpt-oss": ("gpt_oss", "debugmodel", published("gpt_oss", "debugmodel", 0), {}),
}
"""TorchTitan's name and flavor, `config.json`, and sizes in place of the flavor's."""

SPARSE = {"qwen3-moe": (0, 1), "deepseek-v2": (1,), "deepseek-v3": (1,), "gpt-oss": (0, 1)}
"""Indices of the blocks with experts."""


@pytest.fixture(scope="module")
def torchtitan() -> Path:
    """Python of an environment with TorchTitan and the torch of this one, created once."""
    python = ENVIRONMENT / "bin/python"
    if not (ENVIRONMENT / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
        there = subprocess.run([python, "-c", purelib], text=True, capture_output=True, check=True)
        here = Path(there.stdout.strip()) / "torch_of_the_tests.pth"
        at = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
        here.write_text("\n".join(at))
        install = ["pip", "install", "--quiet", "--no-deps", *WANTED]
        subprocess.run([python, "-m", *install], check=True)
        (ENVIRONMENT / "made").touch()
    return python


def make(config: dict[str, Any]) -> Any:
    """Make a transformers model of two blocks with eager attention."""
    config = {**config, "num_hidden_layers": 2}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    with hf_models.quiet():
        known = transformers.AutoConfig.for_model(**config)
        known._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(known)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale = 0.5 if name.endswith(("bias", "sinks")) else 0.05
            tensor.copy_(torch.randn(tensor.shape) * scale + ("norm" in name))
    return model.eval()


def converted(source: Path, target: Path, options: ConvertOptions) -> Path:
    convert(plan(str(source), options), str(target))
    return target


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchtitan_models_give_the_same_logits_as_transformers(
    torchtitan: Path, tmp_path: Path
) -> None:
    """G10: logits agree within 1e-5 in float32, and every token is routed to the same experts.
    Converted back, the checkpoints have the same bits.

    Method: convert random transformers models with TorchTitan's names. TorchTitan's models load
    every one of their keys by stock DCP in `torchtitan_logits.py`. That script replaces parts of
    TorchTitan that do not run on a CPU.
    """
    tokens = torch.randint(0, 2048, (2, 160), generator=torch.Generator().manual_seed(1))
    wanted, experts = dict[str, torch.Tensor](), dict[str, list[Any]]()
    for case, (name, flavor, config, sizes) in MODELS.items():
        folder, model = tmp_path / "models" / case, make(config)
        source = hf_models.save(model, tmp_path / "hf" / case)
        step = converted(source, folder / "step-0", ConvertOptions(to="dcp", names="titan"))
        back = converted(
            step, tmp_path / "back" / case, ConvertOptions(to="hf", hf_assets=str(source))
        )
        saved, found = (load_file(at / "model.safetensors") for at in (source, back))
        assert saved.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in saved.items()), case
        eps = config["rms_norm_eps"]
        given = {"name": name, "flavor": flavor, "sizes": sizes, "eps": eps, "tokens": tokens}
        torch.save(given, folder / "given.pt")
        chosen: list[Any] = []
        for module in model.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(lambda *call, chosen=chosen: chosen.append(call[-1]))
        with torch.no_grad(), hf_models.quiet():
            wanted[case] = model(tokens).logits
        experts[case] = chosen
    script = Path(__file__).with_name("torchtitan_logits.py")
    ran = subprocess.run([torchtitan, script, tmp_path / "models"], text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for case, logits in wanted.items():
        found = torch.load(tmp_path / "models" / case / "logits.pt", weights_only=True)
        torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5, msg=case)
        ids = [next(t for t in out if not t.is_floating_point()) for out in experts[case]]
        assert len(ids) == len(found["experts"]) == len(SPARSE.get(case, ())), case
        for theirs, ours in zip(found["experts"], ids, strict=True):
            assert torch.equal(theirs.flatten(0, 1), ours.sort(-1).values), case
