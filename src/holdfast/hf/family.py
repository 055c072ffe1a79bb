"""A family of models: the table that relates its tensors on the hub to ours, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.errors import FormatError
from holdfast.hf.mapping import TensorMapping
from holdfast.hf.relation import Alias, Axes, Relation

Config = Mapping[str, Any]
"""What `config.json` says of the language model."""


def _no_axes(config: Config) -> dict[str, Sequence[int]]:  # noqa: ARG001 - as a family's own
    return {}


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose tensors one table describes. docs/families.md shows how to write one."""

    model_types: tuple[str, ...]
    """`model_type` in `config.json`."""

    rows: Callable[[Config], Sequence[Relation]]
    """The table for one configuration."""

    axes: Callable[[Config], Mapping[str, Sequence[int]]] = field(default=_no_axes)
    """Axes beyond those that every decoder has, or in their place: see `decoder_axes`."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of `config.json`, where they are not those of Llama's."""

    prefix: str = ""
    """Of the hub's names, where the language model is a part of a larger one."""

    def with_defaults(self, config: Config) -> Config:
        """The configuration with what it may leave out."""
        return {**_DEFAULTS, **self.defaults, **config}


FUSED_EXPERTS = "fused_experts"
"""Added to a `Config` where experts lie in one tensor as transformers keeps them in memory."""

_DEFAULTS: Mapping[str, Any] = {"tie_word_embeddings": False, "head_dim": None}

EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"
HUB_EMBEDDING = "model.embed_tokens.weight"
HUB_OUTPUT = "lm_head.weight"


def decoder_axes(config: Config) -> dict[str, Sequence[int]]:
    """What each letter stands for in a table:

    l layers, v vocabulary, d residual stream, f feed-forward; h query heads, k key and value heads,
    x one head, r half of it, s the two halves; e experts, m inside an expert.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    experts = first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0
    sizes = {
        "l": config["num_hidden_layers"],
        "v": config["vocab_size"],
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "h": heads,
        "k": config.get("num_key_value_heads") or heads,
        "x": head_dim,
        "r": head_dim // 2,
        "s": 2,
        "e": experts,
        "m": config.get("moe_intermediate_size") or config["intermediate_size"],
    }
    return {axis: range(size) for axis, size in sizes.items()}


def first(config: Config, *keys: str) -> Any:
    """The value of the first of these keys that there is."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def mapping_of(family: Family, config: Config, *, fused_experts: bool = False) -> TensorMapping:
    """The family's table with the sizes of one configuration.

    Raises:
        FormatError: the configuration lacks a size.
    """
    whole = {**family.with_defaults(config), FUSED_EXPERTS: fused_experts}
    try:
        rows = [_prefixed(row, family.prefix) for row in family.rows(whole)]
        axes: Axes = {**decoder_axes(whole), **family.axes(whole)}
    except KeyError as error:
        raise FormatError(
            f"`config.json` of a {family.model_types[0]} has no {error}",
            hint="is it the one that belongs to these weights?",
        ) from error
    aliases = []
    if whole["tie_word_embeddings"]:
        names = (family.prefix + HUB_OUTPUT, family.prefix + HUB_EMBEDDING)
        aliases.append(Alias(OUTPUT, EMBEDDING, *names))
        rows = [row for row in rows if row.native.name != OUTPUT]
    return TensorMapping(rows, axes, aliases)


def fused_experts(family: Family, config: Config, names: Collection[str]) -> bool:
    """Whether these are tensors of the hub's side with experts as transformers keeps them in
    memory, where the hub has a tensor for each."""
    known = {*mapping_of(family, config).names("hub")}
    return any(_FUSED.search(name) and name not in known for name in names)


_FUSED = re.compile(r"\.mlp\.experts\.gate_up_proj$")


def _prefixed(row: Relation, prefix: str) -> Relation:
    return replace(row, hub=replace(row.hub, name=prefix + row.hub.name))
