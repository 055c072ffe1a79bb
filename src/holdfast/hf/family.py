"""A family of models: the table that relates its tensors on the hub to ours, and its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from reprlib import repr as shortened
from typing import Any

from holdfast.errors import FormatError
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.relation import Alias, Axes, Relation, Side

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
    heads = count(config, "num_attention_heads", least=1)
    head_dim = count(config, "head_dim", default=0) or count(config, "hidden_size") // heads
    width = count(config, "intermediate_size")
    experts = (count(config, key, default=0) for key in _EXPERTS)
    sizes = {
        "l": count(config, LAYERS, most=LAYERS_MAX),
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
    return {axis: range(size) for axis, size in sizes.items()}


LAYERS = "num_hidden_layers"

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

COUNT_MAX = 1 << 40
"""Of elements along one axis. Models have a thousandth of it at most."""

LAYERS_MAX = 100_000

NAMES_MAX = 250_000
"""Of tensors on one side of a table: several times as many as the largest models have. Each takes
about 10 us and 700 bytes to spell, which bounds what an absurd configuration costs."""

_HINT = "is it the one that belongs to these weights?"


def count(
    config: Config, key: str, *, default: int | None = None, least: int = 0, most: int = COUNT_MAX
) -> int:
    """A size in a configuration, which a stranger may have written; `default` where it is left out.

    Raises:
        KeyError: it is left out, and there is no default.
        FormatError: it is no whole number, or none that a model has.
    """
    found = config.get(key)
    if found is None and (default is not None or key not in config):
        if default is None:
            raise KeyError(key)
        return default
    if type(found) is not int or not least <= found <= most:
        raise _absurd(key, f"a whole number from {least} to {most}", found)
    return found


def flag(config: Config, key: str) -> bool:
    """Whether a configuration says yes; false where it says nothing.

    Raises:
        FormatError: it says neither yes nor no.
    """
    found = config.get(key)
    if found is not None and type(found) is not bool:
        raise _absurd(key, "true or false", found)
    return bool(found)


def numbers(config: Config, key: str) -> frozenset[int] | None:
    """The layers that a configuration lists; None where it lists none.

    Raises:
        FormatError: it is no list of whole numbers.
    """
    found = config.get(key)
    if found is None:
        return None
    whole = isinstance(found, list | tuple) and all(type(one) is int for one in found)
    if not whole or len(found) > LAYERS_MAX:
        raise _absurd(key, "a list of layers", found)
    return frozenset(found)


def _absurd(key: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"`config.json`: `{key}` must be {expected}, found: {shortened(found)}",
        hint=_HINT,
    )


def mapping_of(family: Family, config: Config, *, fused_experts: bool = False) -> TensorMapping:
    """The family's table with the sizes of one configuration.

    Raises:
        FormatError: the configuration lacks a size, or has one that no model has.
    """
    whole = {**family.with_defaults(config), FUSED_EXPERTS: fused_experts}
    rows, axes = rows_and_axes(family, whole)
    aliases = []
    if flag(whole, "tie_word_embeddings"):
        names = (family.prefix + HUB_OUTPUT, family.prefix + HUB_EMBEDDING)
        aliases.append(Alias(OUTPUT, EMBEDDING, *names))
        rows = [row for row in rows if row.native.name != OUTPUT]
    return TensorMapping(rows, axes, aliases)


def rows_and_axes(family: Family, config: Config) -> tuple[list[Relation], Axes]:
    """The family's table for a configuration that has all defaults, and the size of each axis.

    Raises:
        FormatError: the configuration lacks a size, or has one that no model has.
    """
    try:
        rows = [_prefixed(row, family.prefix) for row in family.rows(config)]
        axes: Axes = {**decoder_axes(config), **family.axes(config)}
    except KeyError as error:
        raise FormatError(
            f"`config.json` of a {family.model_types[0]} has no {error}",
            hint=_HINT,
        ) from error
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FormatError(
            f"`config.json` of a {family.model_types[0]} has a value that none has: "
            f"{str(error)[:100]}",
            hint=_HINT,
        ) from error
    for side in ("native", "hub"):
        num_names = sum(_num_names(getattr(row, side), row, axes) for row in rows)
        if num_names > NAMES_MAX:
            raise FormatError(
                f"`config.json` describes {num_names} tensors, more than {NAMES_MAX}",
                hint=_HINT,
            )
    return rows, axes


def _num_names(side: Side, row: Relation, axes: Axes) -> int:
    words = row.words
    return prod(len(words.get(axis) or axes[axis]) for axis in side.name_axes)


def fused_experts(family: Family, config: Config, names: Collection[str]) -> bool:
    """Whether these are tensors of the hub's side with experts as transformers keeps them in
    memory, where the hub has a tensor for each."""
    known = {*mapping_of(family, config).names("hub")}
    return any(_FUSED.search(name) and name not in known for name in names)


_FUSED = re.compile(r"\.mlp\.experts\.gate_up_proj$")


def _prefixed(row: Relation, prefix: str) -> Relation:
    return replace(row, hub=replace(row.hub, name=prefix + row.hub.name))
