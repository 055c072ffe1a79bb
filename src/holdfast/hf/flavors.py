"""Sizes of the models that the reference run can train, and the `config.json` of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from holdfast.hf.rope import DynamicScaling, Llama3Scaling, Scaling, rope_scaling_of


@dataclass(frozen=True, slots=True)
class ExpertFlavor:
    """Sizes of a mixture of experts."""

    num_experts: int
    """Number of experts in each block."""

    num_active: int
    """Number of experts that each token is routed to."""

    hidden_dim: int
    """Width inside an expert."""

    normalized: bool = True
    """Whether the weights of a token's experts sum to 1."""


@dataclass(frozen=True, slots=True)
class Flavor:
    """One size of a model."""

    dim: int
    """Width of the residual stream."""

    num_layers: int
    """Number of transformer blocks."""

    num_heads: int
    """Number of query heads."""

    num_kv_heads: int
    """Number of key and value heads, each shared by `num_heads // num_kv_heads` query heads."""

    hidden_dim: int
    """Width inside the feed-forward; unused where `experts` is set."""

    vocab_size: int | None = 128256
    """Rows of the embedding; None: the size of the tokenizer's vocabulary."""

    norm_eps: float = 1e-5
    """Epsilon of the norms."""

    rope_theta: float = 500000.0
    """Base of the rotary frequencies."""

    rope_scaling: Scaling | None = None
    """Scaling of the rotary frequencies for longer sequences, or None."""

    rope_halves: bool = False
    """Whether rotation pairs element i of a head with i + head_dim/2, as in Qwen; false: adjacent
    elements, as in Meta's models."""

    tied: bool = False
    """Whether `output.weight` is `tok_embeddings.weight`, as in Llama 3.2 1B and 3B."""

    head_width: int | None = None
    """Width of one head; None: `dim // num_heads`."""

    head_norm: bool = False
    """Whether the queries and keys of each head are normalised before rotation."""

    experts: ExpertFlavor | None = None
    """Mixture of experts in place of the feed-forward of every block, or None."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.head_width or self.dim // self.num_heads


def config_of(name: str, flavor: Flavor, vocab_size: int) -> dict[str, Any]:
    """Return the `config.json` of a flavor. `name` is a key of `MODELS`."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": flavor.dim,
        "intermediate_size": flavor.hidden_dim,
        "num_hidden_layers": flavor.num_layers,
        "num_attention_heads": flavor.num_heads,
        "num_key_value_heads": flavor.num_kv_heads,
        "head_dim": flavor.head_dim,
        "vocab_size": vocab_size,
        "rms_norm_eps": flavor.norm_eps,
        "rope_theta": flavor.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": flavor.tied,
        "attention_bias": False,
    }
    if flavor.rope_scaling is not None:
        config["rope_scaling"] = rope_scaling_of(flavor.rope_scaling)
        config["max_position_embeddings"] = 131072
    if isinstance(flavor.rope_scaling, DynamicScaling):
        config["max_position_embeddings"] = flavor.rope_scaling.original_seq_len
    if name == "qwen3_moe" and flavor.experts is not None:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": flavor.experts.num_experts,
            "num_experts_per_tok": flavor.experts.num_active,
            "moe_intermediate_size": flavor.experts.hidden_dim,
            "norm_topk_prob": flavor.experts.normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if flavor.rope_scaling is None:
            config["max_position_embeddings"] = 40960
    return config


LLAMA3: dict[str, Flavor] = {
    "debugmodel": Flavor(256, 6, 8, 4, 704, vocab_size=None),
    "1B": Flavor(2048, 16, 32, 8, 8192, rope_scaling=Llama3Scaling(32), tied=True),
    "3B": Flavor(3072, 28, 24, 8, 8192, rope_scaling=Llama3Scaling(32), tied=True),
    "8B": Flavor(4096, 32, 32, 8, 14336, rope_scaling=Llama3Scaling(8)),
    "70B": Flavor(8192, 80, 64, 8, 28672, rope_scaling=Llama3Scaling(8)),
    "405B": Flavor(16384, 126, 128, 8, 53248, rope_scaling=Llama3Scaling(8)),
}
"""Llama 3.1 (8B, 70B, 405B) and 3.2 (1B, 3B), and a small one that trains on two CPU cores."""


def qwen3_moe(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, experts: ExpertFlavor
) -> Flavor:
    """Return a flavor of Qwen3 with experts in every block. Other settings are the published
    ones."""
    return Flavor(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_dim=experts.hidden_dim,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_halves=True,
        head_width=128,
        head_norm=True,
        experts=experts,
    )


QWEN3_MOE: dict[str, Flavor] = {
    "debugmodel": replace(
        qwen3_moe(256, 4, 8, 4, ExpertFlavor(8, 2, 192)), vocab_size=None, head_width=32
    ),
    "30B-A3B": qwen3_moe(2048, 48, 32, 4, ExpertFlavor(128, 8, 768)),
    "235B-A22B": qwen3_moe(4096, 94, 64, 4, ExpertFlavor(128, 8, 1536)),
}
"""Qwen3's published mixtures of experts, and a small one that trains on two CPU cores."""

MODELS: dict[str, dict[str, Flavor]] = {"llama3": LLAMA3, "qwen3_moe": QWEN3_MOE}
"""Flavors by `model.name`, then by `model.flavor`."""
