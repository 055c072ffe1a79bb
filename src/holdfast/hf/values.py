"""Values of a model that its tensors do not show: rotary frequencies, epsilon, routing.

Weights that are loaded into a model with other values give other logits, without any error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from reprlib import repr as shortened
from typing import Any

from holdfast.errors import FormatError, MismatchError
from holdfast.hf.flavors import Flavor
from holdfast.hf.rope import rope_of

Config = Mapping[str, Any]
"""Contents of `config.json`."""

MODEL_TYPES: Mapping[str, tuple[str, ...]] = {
    "llama3": ("llama", "mistral"),
    "qwen3_moe": ("qwen3_moe",),
}
"""Values of `model_type` that a native model computes, by its name in `flavors.MODELS`."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen3_moe": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "norm_topk_prob": False,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
}
"""Values of transformers for keys that a `config.json` lacks, by model type."""

_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Values that native models have, whatever the configuration."""

_COMPARED = "rms_norm_eps norm_topk_prob num_experts_per_tok hidden_act sliding_window"


def with_values(flavor: Flavor, config: Config, *, where: str) -> Flavor:
    """Return a flavor with the values of a configuration.

    `where` names the configuration in errors, with backticks.

    Raises:
        MismatchError: the native model cannot compute it. All such values are listed.
    """
    config = _with_defaults(config)
    wrong = [
        f"`{key}` is {shortened(config[key])}, expected: {expected}"
        for key, expected in _FIXED.items()
        if config.get(key) is not None and config[key] != expected
    ]
    wrong += _sliding(config)
    eps: Any = config.get("rms_norm_eps")
    theta, scaling = flavor.rope_theta, flavor.rope_scaling
    try:
        theta, scaling = rope_of(config)
    except FormatError as error:
        wrong.append(error.what)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        wrong.append(f"`rms_norm_eps` must be a number above 0, found: {shortened(eps)}")
    experts = flavor.experts
    if experts is not None:
        num_active = config.get("num_experts_per_tok")
        if type(num_active) is not int or not 0 < num_active <= experts.num_experts:
            wrong.append(
                f"`num_experts_per_tok` must be a number of the {experts.num_experts} experts, "
                f"found: {shortened(num_active)}"
            )
        else:
            normalized = config.get("norm_topk_prob") is True
            experts = replace(experts, num_active=num_active, normalized=normalized)
    if wrong:
        raise MismatchError(
            f"{where} has values that the native model does not compute:\n  " + "\n  ".join(wrong),
            hint="train the model by its own code, with `CheckpointManager(..., hub=holdfast.hf."
            "export.HFModel(config))`; for the tokenizer alone, use a folder without `config.json`",
        )
    return replace(
        with_sizes(flavor, config),
        norm_eps=float(eps),
        rope_theta=theta,
        rope_scaling=scaling,
        experts=experts,
    )


def with_sizes(flavor: Flavor, config: Config) -> Flavor:
    """Return a flavor with the head of a configuration, tied or not, and the width of its heads."""
    width = config.get("head_dim")
    return replace(
        flavor,
        tied=config.get("tie_word_embeddings") is True,
        head_width=width if type(width) is int else None,
    )


def _with_defaults(config: Config) -> dict[str, Any]:
    """Return a configuration with the values of transformers for missing keys."""
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def _sliding(config: Config) -> Iterator[str]:
    """Yield a line if attention is limited to a window."""
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if is_used and window is not None:
        yield f"`sliding_window` is {shortened(window)}, expected: null"


def value_differences(one: Config, other: Config) -> list[str]:
    """Return one line per value that differs, if both configurations have it."""
    values = _values(one), _values(other)
    return [
        f"`{key}` is {shortened(value)} and {shortened(values[1][key])}"
        for key, value in values[0].items()
        if key in values[1] and values[1][key] != value
    ]


def untrained_positions(config: Config, seq_len: int | None) -> str | None:
    """Return a note if a configuration allows longer inputs than the `seq_len` tokens of the
    training sequences; None if it does not, or one of both is unknown."""
    positions = config.get("max_position_embeddings")
    if seq_len is None or type(positions) is not int or positions <= seq_len:
        return None
    return (
        f"`max_position_embeddings` is {positions}, and this run trained on sequences of {seq_len} "
        "tokens: whatever the model does beyond them, it had learned before"
    )


def _values(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by name, and those that transformers uses for missing
    keys of the models that can be trained here."""
    known = _with_defaults(config)
    values = {key: known[key] for key in _COMPARED.split() if key in known}
    if not known.get("use_sliding_window", True):
        values["sliding_window"] = None
    has_rope = {"rope_theta", "rope_parameters", "rope_scaling"} & config.keys()
    if has_rope or str(config.get("model_type")) in _DEFAULTS:
        with suppress(FormatError):
            # `rope_of` refuses null, and then no rotary value would be compared.
            given = {key: value for key, value in known.items() if value is not None}
            values["rope_theta"], values["rope_scaling"] = rope_of(given)
    return values
