"""Model families: a table that relates Hugging Face tensors to native tensors, and sizes of
axes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from reprlib import repr as shortened
from typing import Any

from holdfast.errors import FormatError
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.relation import Axes, Relation

Config = Mapping[str, Any]
"""Contents of `config.json`, for the language model alone."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models whose tensors one table describes. docs/families.md shows how to write a table."""

    model_types: tuple[str, ...]
    """Values of `model_type` in `config.json`."""

    rows: Callable[[Config], Sequence[Relation]]
    """Function that returns the table for a configuration."""

    axes: Callable[[Config], Mapping[str, Sequence[int]]] = field(default=lambda _: {})
    """Function that returns further axes, or other sizes for some of `decoder_axes`."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values for keys missing in `config.json`, where they differ from Llama's."""

    prefix: str = ""
    """Prefix of the Hugging Face names, if the language model is a part of a larger model."""

    alone: tuple[str, str] | None = None
    """`model_type` and class for exports of the language model without the larger model; None:
    unknown, or there is no larger model."""

    def with_defaults(self, config: Config) -> Config:
        """Return the configuration with values for missing keys."""
        return {**_DEFAULTS, **self.defaults, **config}


FUSED_EXPERTS = "fused_experts"
"""Key added to a `Config`: true if the experts of a layer are in one tensor, as transformers has
them in memory."""

_FUSED = ".mlp.experts.gate_up_proj"

_DEFAULTS: Mapping[str, Any] = {"tie_word_embeddings": False, "head_dim": None}

EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"


def decoder_axes(config: Config) -> dict[str, Sequence[int]]:
    """Return the indices of each axis that all decoders have:

    `l` layers; `v` vocabulary; `d` width of the residual stream; `f` width inside the feed-forward;
    `h` query heads; `k` key and value heads; `x` elements of a head; `r` elements of half a head;
    `s` the two halves of a head; `e` experts; `m` width inside an expert.
    """
    heads = count(config, "num_attention_heads", least=1)
    head_dim = count(config, "head_dim", default=0) or count(config, "hidden_size") // heads
    width = count(config, "intermediate_size")
    experts = (count(config, key, default=0) for key in _EXPERTS)
    sizes = {
        "v": count(config, "vocab_size"),
        "d": count(config, "hidden_size"),
        "f": width,
        "h": heads,
        "k": count(config, "num_key_value_heads", default=0) or heads,
        "x": head_dim,
        "r": head_dim // 2,
        "s": 2,
        "e": next(filter(None, experts), 0),
        "m": count(config, "moe_intermediate_size", default=0) or width,
    }
    return {"l": layers(config), **{axis: range(size) for axis, size in sizes.items()}}


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

COUNT_MAX = 1 << 40
"""Most elements along one axis. Real models have at most a thousandth of this number."""

LAYERS_MAX = 100_000

NAMES_MAX = 250_000
"""Most tensors on one side of a table: several times as many as the largest models have. Each
tensor costs about 10 us and 700 bytes, so this limit bounds the cost of an absurd configuration."""

_HINT = "check that this `config.json` belongs to these weights"


def count(
    config: Config, key: str, *, default: int | None = None, least: int = 0, most: int = COUNT_MAX
) -> int:
    """Return a size from an untrusted configuration, or `default` if the key is missing.

    Raises:
        KeyError: the key is missing and there is no default.
        FormatError: the value is not a whole number, or is out of range.
    """
    value = config.get(key)
    if value is None and (default is not None or key not in config):
        if default is None:
            raise KeyError(key)
        return default
    if type(value) is not int or not least <= value <= most:
        raise _absurd(key, f"a whole number from {least} to {most}", value)
    return value


def layers(config: Config) -> range:
    """Return the indices of all layers. Raises the errors of `count`."""
    return range(count(config, "num_hidden_layers", most=LAYERS_MAX))


def flag(config: Config, key: str) -> bool:
    """Return a boolean from an untrusted configuration; false if the key is missing."""
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise _absurd(key, "true or false", value)
    return bool(value)


def numbers(config: Config, key: str) -> frozenset[int] | None:
    """Return the layers that an untrusted configuration lists under `key`; None if the key is
    missing."""
    value = config.get(key)
    if value is None:
        return None
    is_valid = isinstance(value, list | tuple) and all(type(one) is int for one in value)
    if not is_valid or len(value) > LAYERS_MAX:
        raise _absurd(key, "a list of layers", value)
    return frozenset(value)


def _absurd(key: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"`config.json`: `{key}` must be {expected}, found: {shortened(found)}", hint=_HINT
    )


def mapping_of(family: Family, config: Config, *, fused_experts: bool = False) -> TensorMapping:
    """Return the family's table with the sizes of one configuration. `fused_experts`: whether one
    Hugging Face tensor holds all experts of a layer."""
    config = {**family.with_defaults(config), FUSED_EXPERTS: fused_experts}
    rows, axes = rows_and_axes(family, config)
    if not flag(config, "tie_word_embeddings"):
        return TensorMapping(rows, axes)
    hf_alias = {family.prefix + HF_OUTPUT: family.prefix + HF_EMBEDDING}
    rows = [row for row in rows if row.native.name != OUTPUT]
    return TensorMapping(rows, axes, {"native": {OUTPUT: EMBEDDING}, "hf": hf_alias})


def rows_and_axes(family: Family, config: Config) -> tuple[list[Relation], Axes]:
    """Return the family's relations and axes. `config` must have all keys: see `with_defaults`."""
    of_family = f"`config.json` of a {family.model_types[0]}"
    try:
        rows = [
            replace(row, hf=replace(row.hf, name=family.prefix + row.hf.name))
            for row in family.rows(config)
        ]
        axes: Axes = {**decoder_axes(config), **family.axes(config)}
    except KeyError as error:
        raise FormatError(f"{of_family} has no {error}", hint=_HINT) from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FormatError(
            f"{of_family} has an impossible value: {str(error)[:100]}", hint=_HINT
        ) from error
    for side in ("native", "hf"):
        num_names = sum(
            prod(len(row.words.get(axis) or axes[axis]) for axis in row.side(side).name_axes)
            for row in rows
        )
        if num_names > NAMES_MAX:
            raise FormatError(
                f"`config.json` describes {num_names} tensors, more than {NAMES_MAX}", hint=_HINT
            )
    return rows, axes


def fused_experts(published: TensorMapping, names: Collection[str]) -> bool:
    """Return whether Hugging Face tensors with these names have the experts of a layer in one
    tensor, although published folders have one tensor per expert.

    transformers has fused experts in memory, and some tools save them so. `published`: mapping of
    published folders.
    """
    fused = {name for name in names if name.endswith(_FUSED)}
    return bool(fused) and not fused <= {*published.names("hf")}


def mapping_for(family: Family, config: Config, names: Collection[str]) -> TensorMapping:
    """Return the mapping for Hugging Face tensors of these names. They decide whether all experts
    of a layer are in one tensor, or each has its own."""
    published = mapping_of(family, config)
    if fused_experts(published, names):
        return mapping_of(family, config, fused_experts=True)
    return published
