"""Whose sizes a model has: its `config.json`, a flavor's table, and whether they agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.convert.source import Opened
from holdfast.engine.root import open_for_reading
from holdfast.errors import MismatchError, UsageError
from holdfast.hf.families import family_of
from holdfast.hf.family import EMBEDDING, HUB_EMBEDDING, Config, decoder_axes
from holdfast.hf.flavors import MODELS, config_of
from holdfast.hf.folder import CONFIG, of_language_model, read_config
from holdfast.hf.tensors import Tensors

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


def config_of_model(
    opened: Opened, model: Tensors, assets: str | None, name: str | None, flavor: str | None
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
        known = _named(model, name, flavor, [config for config, _ in found])
        if known is not None:
            found.append((known, f"flavor {flavor}"))
    for other in found[1:]:
        check_alike(found[0], other)
    return found[0] if found else (None, "")


def _named(
    model: Tensors, name: str, flavor: str | None, configs: Sequence[Config]
) -> dict[str, Any] | None:
    for key, given, known in (
        ("name", name, list(MODELS)),
        ("flavor", flavor, list(MODELS.get(name, ()))),
    ):
        if given is not None and given not in known:
            raise UsageError(
                f"`--model-{key}` is one of {', '.join(known)}, found: {given}",
                hint="leave both out: family and sizes are read from `config.json`",
            )
    if flavor is None:
        return None
    shape = MODELS[name][flavor]
    embeddings = [model.held[n].shape[0] for n in (EMBEDDING, HUB_EMBEDDING) if n in model.held]
    said = [config["vocab_size"] for config in configs if "vocab_size" in config]
    return config_of(name, shape, shape.vocab_size or next(iter([*said, *embeddings]), 0))


def check_alike(one: tuple[Config, str], other: tuple[Config, str]) -> None:
    """Make sure that two configurations, each with who says so, are of models of the same shapes.

    Raises:
        MismatchError: all that they say differently.
    """
    says = one[1], other[1]
    configs = of_language_model(one[0]), of_language_model(other[0])
    families = [family_of(c, where=where) for c, where in zip(configs, says, strict=True)]
    wrong = []
    if families[0] != families[1]:
        wrong.append("model_type is {} and {}".format(*(c["model_type"] for c in configs)))
    else:
        full = [family.with_defaults(c) for family, c in zip(families, configs, strict=True)]
        ours, theirs = map(decoder_axes, full)
        for axis, key in _COMPARED.items():
            if len(ours[axis]) != len(theirs[axis]):
                wrong.append(f"{key} is {len(ours[axis])} and {len(theirs[axis])}")
        tied = [bool(c["tie_word_embeddings"]) for c in full]
        if tied[0] != tied[1]:
            wrong.append("tie_word_embeddings is {} and {}".format(*tied))
    if wrong:
        raise MismatchError(
            f"{says[0]} and {says[1]} are of different models:\n  " + "\n  ".join(wrong),
            hint="leave out `--model-name` and `--model-flavor`, or give those of these weights",
        )
