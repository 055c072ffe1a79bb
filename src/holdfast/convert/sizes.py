"""Finds the configuration of a model in `config.json` or from a flavor. If both are given, checks
that they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from reprlib import repr as shortened
from typing import Any

from holdfast.catalog.hf_folder import CONFIG, of_language_model, read_config
from holdfast.catalog.paths import open_for_reading
from holdfast.convert.source import ConvertSource
from holdfast.errors import MismatchError, UsageError
from holdfast.hf.families import family_of, table_of
from holdfast.hf.family import EMBEDDING, HF_EMBEDDING, Config, Family, count, flag, rows_and_axes
from holdfast.hf.published import TYPES, flavors_of, published
from holdfast.tensors.lazy import Tensors

_COMPARED_AXES = {
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
"""Names of the sizes that are compared, by axis letter of `decoder_axes`."""

_COMPARED_KEYS = (
    "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim n_shared_experts "
    "first_k_dense_replace intermediate_size_mlp interleave_moe_layer_step"
)
"""Further sizes that are compared if both configurations have them."""


def config_of_model(
    opened: ConvertSource, model: Tensors, assets: str | None, name: str | None, flavor: str | None
) -> tuple[Config | None, str]:
    """Return the complete configuration of the model, or None if it is unknown, and its origin for
    messages. `assets`: folder that may have a `config.json`. `name`, `flavor`: TorchTitan's names
    of the family and of the size."""
    found: list[tuple[Config, str]] = []
    for path in filter(None, (opened.where if opened.has_config else None, assets)):
        if (config_there := config_at(path)) is not None:
            found.append((config_there, f"`{path}/{CONFIG}`"))
    if name is not None:
        config = _config_by_name(model, name, flavor, found)
        if config is not None:
            found.append((config, f"flavor {flavor} of {name}"))
    elif flavor is not None:
        raise UsageError(
            f"`--model-flavor {flavor}` needs `--model-name` too",
            hint=f"`--model-name` is one of {', '.join(TYPES)}",
        )
    for other in found[1:]:
        check_alike(found[0], other)
    return found[0] if found else (None, "")


def config_at(folder: str) -> dict[str, Any] | None:
    """Return the `config.json` in a folder; None if there is none."""
    store, name = open_for_reading(folder)
    return read_config(store, name) if CONFIG in store.list(name) else None


def _config_by_name(
    model: Tensors, name: str, flavor: str | None, found: Sequence[tuple[Config, str]]
) -> dict[str, Any] | None:
    """Check `name` and `flavor`, TorchTitan's names of the family and of the size. Return the
    configuration of the flavor; None if no flavor is given. `found`: other configurations of the
    model, with their origins."""
    hint = f"family and sizes are read from `{CONFIG}` if you leave out this option"
    if name not in TYPES:
        raise UsageError(
            f"`--model-name` must be one of {', '.join(TYPES)}, found: {name}", hint=hint
        )
    flavors = flavors_of(name)
    if flavor is not None and flavor not in flavors:
        expected = f"must be one of {', '.join(flavors)}" if flavors else "cannot be used"
        raise UsageError(
            f"`--model-flavor` {expected} with `--model-name {name}`, found: {flavor}", hint=hint
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
    sizes = [count(config, "vocab_size") for config, _ in found if "vocab_size" in config]
    sizes += [model.infos[n].shape[0] for n in (EMBEDDING, HF_EMBEDDING) if n in model.infos]
    return published(name, flavor, sizes[0] if sizes else 0)


def check_alike(one: tuple[Config, str], other: tuple[Config, str]) -> None:
    """Check that two configurations describe models with the same shapes. Each comes with its
    origin."""
    origins = one[1], other[1]
    configs = of_language_model(one[0]), of_language_model(other[0])
    if None in (table_of(one[0]), table_of(other[0])):
        _check_alike_without_table(configs, origins)
        return
    families = [family_of(c, where=where) for c, where in zip(configs, origins, strict=True)]
    wrong = []
    if families[0].rows != families[1].rows:
        wrong.append("model_type is {} and {}".format(*(c["model_type"] for c in configs)))
    else:
        full = [family.with_defaults(c) for family, c in zip(families, configs, strict=True)]
        a, b = (rows_and_axes(f, c)[1] for f, c in zip(families, full, strict=True))
        used = {"l", *_used_axes(families[0], full[0]), *_used_axes(families[1], full[1])}
        for axis, size in _COMPARED_AXES.items():
            if axis in used and len(a[axis]) != len(b[axis]):
                wrong.append(f"{size} is {len(a[axis])} and {len(b[axis])}")
        for key in _COMPARED_KEYS.split():
            sizes = [c.get(key) for c in full]
            if sizes[0] != sizes[1] and all(key in c for c in full):
                wrong.append("{} is {} and {}".format(key, *sizes))
        tied = [flag(c, "tie_word_embeddings") for c in full]
        if tied[0] != tied[1]:
            wrong.append("tie_word_embeddings is {} and {}".format(*tied))
    if wrong:
        raise _different(origins, wrong)


def _check_alike_without_table(configs: tuple[Config, Config], origins: tuple[str, str]) -> None:
    """Check that two configurations agree on the model type, and on the sizes that both have.
    `origins`: their origins, for messages."""
    wrong = [
        f"{key} is {shortened(configs[0][key])} and {shortened(configs[1][key])}"
        for key in ("model_type", *_COMPARED_AXES.values(), *_COMPARED_KEYS.split())
        if all(key in config for config in configs) and configs[0][key] != configs[1][key]
    ]
    if wrong:
        raise _different(origins, wrong)


def _different(origins: tuple[str, str], wrong: Sequence[str]) -> MismatchError:
    return MismatchError(
        f"{origins[0]} and {origins[1]} are of different models:\n  " + "\n  ".join(wrong),
        hint="leave out `--model-name` and `--model-flavor`, or give those of these weights",
    )


def _used_axes(family: Family, config: Config) -> Iterator[str]:
    """Yield the name of each axis that tensors of the model have, such as `d`. The configuration
    may have sizes of other axes too, for kinds of layers that the model lacks."""
    rows, axes = rows_and_axes(family, config)
    for row in rows:
        if all(len(axes[axis]) for axis in row.native.name_axes if axis in axes):
            yield from row.native.axes
