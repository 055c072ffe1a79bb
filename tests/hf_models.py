"""Small random transformers models of every family."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"head_dim": 16}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
SPARSE = {"intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}
LATENT = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, **WIDE}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", WIDE),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", WIDE),
    "qwen3-biased": ("Qwen3Config", {"attention_bias": True, **WIDE}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, **WIDE, **EXPERTS}),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "mlp_only_layers": [0], **WIDE, **EXPERTS},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "deepseek-v3": ("DeepseekV3Config", {"q_lora_rank": 20, **LATENT, **EXPERTS}),
    "deepseek-v3-plain": ("DeepseekV3Config", {"q_lora_rank": None, **LATENT, **EXPERTS}),
    "deepseek-v2": (
        "DeepseekV2Config",
        {"q_lora_rank": None, **LATENT, **EXPERTS, "topk_method": "greedy"},
    ),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **WIDE}),
    "gemma-2": ("Gemma2Config", WIDE),
    "gemma-3": ("Gemma3TextConfig", WIDE),
    "gemma-3-untied": ("Gemma3TextConfig", {"tie_word_embeddings": False, **WIDE}),
    "phi-3": ("Phi3Config", {}),
    "llama-4": ("Llama4TextConfig", {"num_local_experts": 4, **SPARSE, **WIDE}),
}
"""Class of the configuration, and its values besides `SIZES`, by name of the model."""


def make(name: str) -> Any:
    """Make a model with random weights, biases and norms."""
    kind, more = MODELS[name]
    with quiet():
        config = getattr(transformers, kind)(**{**SIZES, **more})
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model by `save_pretrained`. Returns the folder."""
    with quiet():
        model.save_pretrained(folder, **options)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """Load a folder by `from_pretrained`. Missing or unexpected keys are an error."""
    with quiet():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], f"{key}: {info[key]}"
    return model.eval()


def logits(model: Any) -> Tensor:
    """Return the logits of a few tokens."""
    with torch.no_grad(), quiet():
        result: Tensor = model(torch.arange(3, 19).view(2, 8)).logits
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
