"""What native tensors are called: by Meta, and so by TorchTitan up to 0.2 and by torchtune; and by
TorchTitan from 0.3 on, which renamed some."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

Dialect = Literal["meta", "titan", "hub"]
"""`hub` is no native one: the names that Hugging Face gives."""

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

GATE, BALANCE = "moe.router.gate.weight", "moe.expert_bias"
"""TorchTitan balances the experts of every family by a buffer, zero at first, beside the router.
Most families have no place for it on the hub."""

_LATENT = "attention.wkv_a"
"""Where keys come from latent vectors, TorchTitan 0.3 kept the name of `wq`."""


def dialect_of(names: Collection[str]) -> Dialect | None:
    """Whose names these are; None where they are nobody's that is known here."""
    if any("embed_tokens." in name or ".self_attn." in name for name in names):
        return "hub"
    told = re.compile("|".join(map(_pattern, _RENAMED.values())))
    if any(told.search(name) for name in names):
        return "titan"
    known = re.compile(r"(?:^|\.)(tok_embeddings\.weight|attention\.w[qk]\w*\.|feed_forward\.w1\.)")
    return "meta" if any(known.search(name) for name in names) else None


def renamed(names: Collection[str], dialect: Literal["meta", "titan"]) -> dict[str, str]:
    """For each native name what it is in a dialect. Parts of longer names, such as those of an
    optimizer's state, are renamed as well."""
    latent = any(_LATENT in name for name in names)
    pairs = {m: t for m, t in _RENAMED.items() if not (latent and m.startswith("attention."))}
    table = pairs if dialect == "titan" else {titan: meta for meta, titan in pairs.items()}
    told = re.compile("|".join(map(_pattern, table)))
    return {name: told.sub(lambda match: table[match[0]], name) for name in names}


def balances(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The buffers that are missing beside the routers among these tensors: name and shape."""
    wanted = {n.removesuffix(GATE): s[:1] for n, s in shapes.items() if n.endswith(GATE)}
    there = {n[: n.rindex(BALANCE)] for n in shapes if is_balance(n)}
    return {at + BALANCE: shape for at, shape in wanted.items() if at not in there}


def is_balance(name: str) -> bool:
    """Whether this is such a buffer, in either dialect."""
    return name.endswith((BALANCE, _RENAMED[BALANCE]))


def _pattern(part: str) -> str:
    # `lm_head.weight` and its like are whole only with a dot, or an end, on either side.
    return rf"(?<![^.]){re.escape(part)}(?![^.])"
