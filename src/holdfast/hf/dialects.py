"""Naming dialects: Meta's, TorchTitan's and Hugging Face's names for the tensors of a model.

Meta's names are also those of torchtune, and of TorchTitan up to 0.2. TorchTitan 0.3 renamed some.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

Dialect = Literal["meta", "titan", "hf"]
"""Naming scheme of a model's tensors. `meta` and `titan` are native dialects, `hf` is not."""

_RENAMED: Mapping[str, str] = {
    "output.weight": "lm_head.weight",
    "attention.wq": "attention.qkv_linear.wq",
    "attention.wk": "attention.qkv_linear.wk",
    "attention.wv": "attention.qkv_linear.wv",
    "moe.experts.w1": "moe.routed_experts.inner_experts.w1_EFD",
    "moe.experts.w2": "moe.routed_experts.inner_experts.w2_EDF",
    "moe.experts.w3": "moe.routed_experts.inner_experts.w3_EFD",
    "moe.experts.mlp1_weight": "moe.routed_experts.inner_experts.mlp1_weight_EGD",
    "moe.experts.mlp1_bias": "moe.routed_experts.inner_experts.mlp1_bias_EG",
    "moe.experts.mlp2_weight": "moe.routed_experts.inner_experts.mlp2_weight_EDF",
    "moe.experts.mlp2_bias": "moe.routed_experts.inner_experts.mlp2_bias_ED",
    "moe.expert_bias": "moe.expert_bias_E",
}
"""TorchTitan 0.3's names, by Meta's."""

GATE, BALANCE = "moe.router.gate.weight", "moe.expert_bias"
"""Names of the router weight, and of the buffer beside it with which TorchTitan balances experts.
The buffer starts as zeros. Most families have no Hugging Face tensor for it."""

CORRECTION_BIAS = "e_score_correction_bias"
"""Suffix of Hugging Face's names for biases that correct the scores of experts. Exports keep the
dtype of these biases: rounding them would route tokens to other experts."""

_LATENT = "attention.wkv_a"
"""Name of a weight that only models with latent attention have. TorchTitan 0.3 did not rename the
`wq` of such models."""


_EMBEDDING = re.compile(r"(?:^|\.)tok_embeddings\.weight$")


def dialect_of(names: Collection[str]) -> Dialect | None:
    """Return the dialect of these names, or None if it is unknown."""
    # Look for native names first: the other parts of a multimodal model have Hugging Face's names
    # in every dialect.
    native = any(_EMBEDDING.search(name) for name in names)
    if not native and any("embed_tokens." in name or ".self_attn." in name for name in names):
        return "hf"
    titan, head = _any_of(_RENAMED.values()), _RENAMED["output.weight"]
    meta = re.compile(r"(?:^|\.)(tok_embeddings\.weight|attention\.w[qk]\w*\.|feed_forward\.w1\.)")
    found = {match[0] for name in names if (match := titan.search(name))}
    is_native = any(meta.search(name) for name in names)
    # `lm_head.weight` alone proves nothing: many models of transformers have a head of this name.
    if found - {head} or (found and is_native):
        return "titan"
    return "meta" if is_native else None


def renamed(names: Collection[str], dialect: Literal["meta", "titan"]) -> dict[str, str]:
    """Return the name in `dialect` of each native name.

    Longer names that include a tensor name, as in an optimizer's state, are renamed as well.
    """
    latent = any(_LATENT in name for name in names)
    pairs = {m: t for m, t in _RENAMED.items() if not (latent and m.startswith("attention."))}
    table = pairs if dialect == "titan" else {titan: meta for meta, titan in pairs.items()}
    pattern = _any_of(table)
    return {name: pattern.sub(lambda match: table[match[0]], name) for name in names}


def balances(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each buffer `moe.expert_bias` that a model lacks. TorchTitan has
    one beside each router, and balances experts with it. `shapes`: shape of each tensor of the
    model, under Meta's names."""
    routers = {n.removesuffix(GATE): s[:1] for n, s in shapes.items() if n.endswith(GATE)}
    balanced = {n[: n.rindex(BALANCE)] for n in shapes if is_balance(n)}
    return {prefix + BALANCE: s for prefix, s in routers.items() if prefix not in balanced}


def is_balance(name: str) -> bool:
    """Return whether this is the name of a buffer by which TorchTitan balances experts, in either
    native dialect."""
    return name.endswith((BALANCE, _RENAMED[BALANCE]))


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of these names as whole, dot-separated parts of a longer
    name."""
    return re.compile("|".join(rf"(?<![^.]){re.escape(name)}(?![^.])" for name in names))
