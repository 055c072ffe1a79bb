"""Whose sizes a model has: its `config.json`, a flavor's table, and whether they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from holdfast.catalog.hf_folder import CONFIG, of_language_model, read_config
from holdfast.catalog.paths import open_for_reading
from holdfast.convert.source import ConvertSource
from holdfast.errors import MismatchError, UsageError
from holdfast.hf.families import family_of
from holdfast.hf.family import EMBEDDING, HUB_EMBEDDING, Config, Family, count, flag, rows_and_axes
from holdfast.hf.published import TYPES, flavors_of, published
from holdfast.tensors.lazy import Tensors

_COMPARED = {
    "l": "num_hidden_layers",
    "v": "vocab_size",
    "d": "hidden_size",
    "f": "intermediate_size",
    "h": "num_attention_heads",
    "k": "num_key_value_heads",
    "x": "head_dim",
    "e": "the number of experts",
    "m": "moe_intermediate_size",
}
"""Axes that all decoders have, and what to call their sizes."""

_COMPARED_TOO = (
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("n_shared_experts", "first_k_dense_replace"),
    *("intermediate_size_mlp", "interleave_moe_layer_step"),
)
"""Sizes that only some families have."""


def config_of_model(
    opened: ConvertSource, model: Tensors, assets: str | None, name: str | None, flavor: str | None
) -> tuple[Config | None, str]:
    """The configuration of the model, whole, and who says so; None where nobody does.

    Raises:
        MismatchError: two that say different things.
        UsageError: a name or a flavor that is not known.
    """
    found: list[tuple[Config, str]] = []
    places = [opened.where] if opened.has_config else []
    for place in (*places, *([] if assets is None else [assets])):
        store, folder = open_for_reading(place)
        if CONFIG in store.list(folder):
            found.append((read_config(store, folder), f"`{place}/{CONFIG}`"))
    if name is not None:
        known = _named(model, name, flavor, found)
        if known is not None:
            found.append((known, f"flavor {flavor} of {name}"))
    elif flavor is not None:
        raise UsageError(
            f"`--model-flavor {flavor}` needs `--model-name` too",
            hint=f"`--model-name` is one of {', '.join(TYPES)}",
        )
    for other in found[1:]:
        check_alike(found[0], other)
    return found[0] if found else (None, "")


def _named(
    model: Tensors, name: str, flavor: str | None, found: Sequence[tuple[Config, str]]
) -> dict[str, Any] | None:
    """The configuration that goes by this name and flavor; None where there is only a name, which
    fits what was found."""
    flavors = flavors_of(name)
    for key, given, known in (("name", name, list(TYPES)), ("flavor", flavor, flavors)):
        if given is not None and given not in known:
            raise UsageError(
                f"`--model-{key}` is one of {', '.join(known)}, found: {given}"
                if known
                else f"`--model-name {name}` has no flavors that are known, found: {given}",
                hint=f"leave out `--model-{key}`: family and sizes are read from `{CONFIG}`",
            )
    for config, where in found:
        if config.get("model_type") not in TYPES[name]:
            raise MismatchError(
                f"{where} and `--model-name {name}` are of different families:\n  model_type is "
                f"{config.get('model_type')} and {' or '.join(TYPES[name])}",
                hint="leave out `--model-name`, or give that of these weights",
            )
    if flavor is None:
        return None
    embeddings = [model.held[n].shape[0] for n in (EMBEDDING, HUB_EMBEDDING) if n in model.held]
    said = [count(config, "vocab_size") for config, _ in found if "vocab_size" in config]
    return published(name, flavor, next(iter([*said, *embeddings]), 0))


def check_alike(one: tuple[Config, str], other: tuple[Config, str]) -> None:
    """Make sure that two configurations, each with who says so, are of models of the same shapes.

    Raises:
        MismatchError: all that they say differently.
    """
    says = one[1], other[1]
    configs = of_language_model(one[0]), of_language_model(other[0])
    families = [family_of(c, where=where) for c, where in zip(configs, says, strict=True)]
    wrong = []
    if families[0].rows != families[1].rows:
        wrong.append("model_type is {} and {}".format(*(c["model_type"] for c in configs)))
    else:
        full = [family.with_defaults(c) for family, c in zip(families, configs, strict=True)]
        ours, theirs = (rows_and_axes(f, c)[1] for f, c in zip(families, full, strict=True))
        used = {*_used(families[0], full[0]), *_used(families[1], full[1])}
        for axis, key in _COMPARED.items():
            if len(ours[axis]) != len(theirs[axis]) and (axis in used or axis == "l"):
                wrong.append(f"{key} is {len(ours[axis])} and {len(theirs[axis])}")
        for key in _COMPARED_TOO:
            sizes = [c.get(key) for c in full]
            if sizes[0] != sizes[1] and all(key in c for c in full):
                wrong.append("{} is {} and {}".format(key, *sizes))
        tied = [flag(c, "tie_word_embeddings") for c in full]
        if tied[0] != tied[1]:
            wrong.append("tie_word_embeddings is {} and {}".format(*tied))
    if wrong:
        raise MismatchError(
            f"{says[0]} and {says[1]} are of different models:\n  " + "\n  ".join(wrong),
            hint="leave out `--model-name` and `--model-flavor`, or give those of these weights",
        )


def _used(family: Family, config: Config) -> Iterator[str]:
    """Axes of tensors that there are: dense layers, say, have a size even where there are none."""
    rows, axes = rows_and_axes(family, config)
    for row in rows:
        if all(len(axes[axis]) for axis in row.native.name_axes if axis in axes):
            yield from row.native.axes
