"""Families and sizes by the names that TorchTitan gives them, and what `config.json` says of each.

Those that can be trained here are in `flavors`; the others are as their authors published them, and
TorchTitan's small ones for trying out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.hf.family import Config
from holdfast.hf.flavors import MODELS, ExpertFlavor, config_of, qwen3_moe

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
"""For each name of a family the `model_type` that its configurations may have."""


def _config(
    architecture: str, model_type: str, heads: int, kv_heads: int, /, **more: Any
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


def _yarn(factor: float, theta: float, original: int, **more: Any) -> dict[str, Any]:
    """Rotary frequencies that are stretched as YaRN does it."""
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": original,
        **more,
    }
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": int(original * factor),
    }


def _qwen3(
    sizes: dict[str, Any], heads: int, kv_heads: int = 8, *, tied: bool = False, window: int = 40960
) -> Config:
    return _config(
        *("Qwen3", "qwen3", heads, kv_heads),
        **sizes,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
    )


def _deepseek(
    version: int, sizes: dict[str, Any], heads: int, experts: ExpertFlavor, /, **more: Any
) -> Config:
    """Version 3 scores experts one by one and corrects for their load; 2 chooses by softmax."""
    scale = more.pop("mscale", 1.0)
    return _config(
        *(f"DeepseekV{version}", f"deepseek_v{version}", heads, heads),
        **sizes,
        **_yarn(40.0, 10000.0, 4096, mscale=scale, mscale_all_dim=scale),
        rms_norm_eps=1e-6,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=experts.num_experts,
        num_experts_per_tok=experts.num_active,
        moe_intermediate_size=experts.hidden_dim,
        **(
            {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
            if version == 3
            else {"scoring_func": "softmax", "norm_topk_prob": False}
        ),
        **more,
    )


def _gpt_oss(dim: int, num_layers: int, vocab_size: int, num_experts: int) -> Config:
    turns = ["sliding_attention", "full_attention"] * num_layers
    return _config(
        *("GptOss", "gpt_oss", 64, 8),
        **_sizes(dim, num_layers, 2880, vocab_size),
        **_yarn(32.0, 150000.0, 4096, truncate=False),
        head_dim=64,
        rms_norm_eps=1e-5,
        attention_bias=True,
        num_local_experts=num_experts,
        num_experts_per_tok=4,
        sliding_window=128,
        layer_types=turns[:num_layers],
        swiglu_limit=7.0,
    )


def _llama4(num_experts: int, step: int, *, qk_norm: bool, **more: Any) -> Config:
    return _config(
        *("Llama4", "llama4_text", 40, 8),
        **_sizes(5120, 48, 8192, 202048),
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        intermediate_size_mlp=16384,
        num_local_experts=num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=step,
        use_qk_norm=qk_norm,
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
    "debugmodel": _deepseek(
        *(2, _sizes(256, 6, 1024, 2048), 16, ExpertFlavor(8, 3, 256)),
        mscale=0.7,
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    ),
    "16B": _deepseek(
        *(2, _sizes(2048, 27, 10944, 102400), 16, ExpertFlavor(64, 6, 1408)),
        mscale=0.707,
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    ),
    "236B": _deepseek(
        *(2, _sizes(5120, 60, 12288, 102400), 128, ExpertFlavor(160, 6, 1536)),
        q_lora_rank=1536,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    ),
    "671B": _deepseek(
        *(3, _sizes(7168, 61, 18432, 129280), 128, ExpertFlavor(256, 8, 2048)),
        q_lora_rank=1536,
        n_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
}
"""TorchTitan calls by this name what was published as DeepSeek V2 Lite (16B) and V2 (236B) too."""

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
            *(16, 1),
            qk_norm=True,
            max_position_embeddings=10485760,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "17bx128e": _llama4(128, 2, qk_norm=False, max_position_embeddings=1048576),
    },
}
"""`config.json` by name and flavor, beside those of `MODELS`."""


def flavors_of(name: str) -> list[str]:
    """The sizes that a family is known in."""
    return [*MODELS.get(name, ()), *PUBLISHED.get(name, ())]


def published(name: str, flavor: str, vocab_size: int) -> dict[str, Any]:
    """What the `config.json` of a model of this size says. `vocab_size` is that of a small one
    which does not say."""
    if flavor in PUBLISHED.get(name, ()):
        return {**PUBLISHED[name][flavor]}
    shape = MODELS[name][flavor]
    return config_of(name, shape, shape.vocab_size or vocab_size)
