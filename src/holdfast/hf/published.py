"""Families and flavors by TorchTitan's names, and the `config.json` of each.

`MODELS` in `flavors` has the models that the reference run can train. This module adds the
published sizes of other families, and TorchTitan's small debug models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.hf.family import Config
from holdfast.hf.flavors import MODELS, ExpertFlavor, config_of, qwen3_moe
from holdfast.hf.rope import Llama3Scaling, rope_scaling_of

TYPES: Mapping[str, tuple[str, ...]] = {
    "llama2": ("llama",),
    "llama3": ("llama",),
    "llama4": ("llama4_text", "llama4"),
    "mistral": ("mistral",),
    "mixtral": ("mixtral",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3", "qwen3_moe"),
    "qwen3_moe": ("qwen3_moe",),
    "deepseek_v3": ("deepseek_v3", "deepseek_v2"),
    "gpt_oss": ("gpt_oss",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text", "gemma3"),
    "phi3": ("phi3",),
}
"""Values of `model_type` that a configuration may have, by TorchTitan's name of the family."""


def _config(
    architecture: str, model_type: str, *, heads: int, kv_heads: int, **more: Any
) -> Config:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        "attention_bias": False,
        **more,
    }


def _sizes(dim: int, num_layers: int, hidden_dim: int, vocab_size: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_hidden_layers": num_layers,
        "intermediate_size": hidden_dim,
        "vocab_size": vocab_size,
    }


def _yarn(factor: float, theta: float, **more: Any) -> dict[str, Any]:
    """Return rotary settings with YaRN scaling from 4096 positions."""
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        **more,
    }
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": int(4096 * factor),
    }


def _qwen3(
    sizes: dict[str, Any], heads: int, kv_heads: int = 8, *, tied: bool = False, window: int = 40960
) -> Config:
    return _config(
        "Qwen3",
        "qwen3",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=window,
        **sizes | {"tie_word_embeddings": tied},
    )


def _deepseek(
    version: int,
    sizes: dict[str, Any],
    heads: int,
    experts: ExpertFlavor,
    mscale: float = 1.0,
    **more: Any,
) -> Config:
    return _config(
        f"DeepseekV{version}",
        f"deepseek_v{version}",
        heads=heads,
        kv_heads=heads,
        rms_norm_eps=1e-6,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts.num_experts,
        num_experts_per_tok=experts.num_active,
        moe_intermediate_size=experts.hidden_dim,
        **sizes,
        **_yarn(40.0, 10000.0, mscale=mscale, mscale_all_dim=mscale),
        **more,
    )


_DEEPSEEK_V2: Mapping[str, Any] = {
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
}


def _deepseek_v2_lite(sizes: dict[str, Any], experts: ExpertFlavor, mscale: float) -> Config:
    lite = {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    return _deepseek(2, sizes, 16, experts, mscale, **_DEEPSEEK_V2, **lite)


def _gpt_oss(dim: int, num_layers: int, vocab_size: int, num_experts: int) -> Config:
    alternating = ["sliding_attention", "full_attention"] * num_layers
    return _config(
        "GptOss",
        "gpt_oss",
        heads=64,
        kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        num_local_experts=num_experts,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=alternating[:num_layers],
        swiglu_limit=7.0,
        **_sizes(dim, num_layers, 2880, vocab_size) | {"attention_bias": True},
        **_yarn(32.0, 150000.0, truncate=False),
    )


def _llama4(num_experts: int, step: int, *, qk_norm: bool, **more: Any) -> Config:
    return _config(
        "Llama4",
        "llama4_text",
        heads=40,
        kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        intermediate_size_mlp=16384,
        num_local_experts=num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=step,
        use_qk_norm=qk_norm,
        **_sizes(5120, 48, 8192, 202048),
        **more,
    )


QWEN3: Mapping[str, Config] = {
    "debugmodel": _qwen3(_sizes(256, 8, 3072, 2048), 16, tied=True, window=4096),
    "0.6B": _qwen3(_sizes(1024, 28, 3072, 151936), 16, tied=True),
    "1.7B": _qwen3(_sizes(2048, 28, 6144, 151936), 16, tied=True),
    "4B": _qwen3(_sizes(2560, 36, 9728, 151936), 32, tied=True),
    "8B": _qwen3(_sizes(4096, 36, 12288, 151936), 32),
    "14B": _qwen3(_sizes(5120, 40, 17408, 151936), 40),
    "32B": _qwen3(_sizes(5120, 64, 25600, 151936), 64),
    "debugmodel_moe": config_of(
        "qwen3_moe", qwen3_moe(256, 8, 16, 8, ExpertFlavor(64, 8, 768)), 2048
    ),
    "30B-A3B": config_of("qwen3_moe", MODELS["qwen3_moe"]["30B-A3B"], 151936),
    "235B-A22B": config_of("qwen3_moe", MODELS["qwen3_moe"]["235B-A22B"], 151936),
}

DEEPSEEK_V3: Mapping[str, Config] = {
    "debugmodel": _deepseek_v2_lite(_sizes(256, 6, 1024, 2048), ExpertFlavor(8, 3, 256), 0.7),
    "16B": _deepseek_v2_lite(_sizes(2048, 27, 10944, 102400), ExpertFlavor(64, 6, 1408), 0.707),
    "236B": _deepseek(
        2,
        _sizes(5120, 60, 12288, 102400),
        128,
        ExpertFlavor(160, 6, 1536),
        q_lora_rank=1536,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        **_DEEPSEEK_V2,
    ),
    # Version 3 scores experts by sigmoid, and corrects the scores for the experts' load.
    "671B": _deepseek(
        3,
        _sizes(7168, 61, 18432, 129280),
        128,
        ExpertFlavor(256, 8, 2048),
        q_lora_rank=1536,
        n_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        topk_method="noaux_tc",
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        norm_topk_prob=True,
    ),
}
"""TorchTitan's `deepseek_v3` includes the published DeepSeek V2 Lite (16B) and V2 (236B)."""

PUBLISHED: Mapping[str, Mapping[str, Config]] = {
    "qwen3": QWEN3,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": {
        "debugmodel": _gpt_oss(256, 4, 2048, 8),
        "20b": _gpt_oss(2880, 24, 201088, 32),
        "120b": _gpt_oss(2880, 36, 201088, 128),
    },
    "llama4": {
        "17bx16e": _llama4(
            16,
            1,
            qk_norm=True,
            max_position_embeddings=10485760,
            rope_scaling=rope_scaling_of(Llama3Scaling(16.0, high_freq_factor=1.0)),
        ),
        "17bx128e": _llama4(128, 2, qk_norm=False, max_position_embeddings=1048576),
    },
}
"""`config.json` by name and flavor, besides the flavors in `MODELS`."""


def flavors_of(name: str) -> list[str]:
    """Return the names of a family's flavors. `name`: TorchTitan's name of the family."""
    return [*MODELS.get(name, ()), *PUBLISHED.get(name, ())]


def published(name: str, flavor: str, vocab_size: int) -> dict[str, Any]:
    """Return the `config.json` of a flavor. `vocab_size`: used if the flavor states no size of the
    vocabulary."""
    if flavor in PUBLISHED.get(name, ()):
        return {**PUBLISHED[name][flavor]}
    sizes = MODELS[name][flavor]
    return config_of(name, sizes, sizes.vocab_size or vocab_size)
