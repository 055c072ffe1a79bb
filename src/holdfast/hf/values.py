"""Values of a configuration that a model's tensors do not show: rotary base, epsilon, routing.

If weights are loaded into a model with other values, its logits are wrong, without any error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
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
"""Values of `model_type` that a native model can compute, by the model's name in
`flavors.MODELS`."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "sliding_window": None},
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
"""Values that transformers uses for keys missing in `config.json`, by model type."""

_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""The only values of these keys that native models can compute."""

_COMPARED = (
    "num_attention_heads num_key_value_heads head_dim layer_types no_rope_layers "
    "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon "
    "hidden_act hidden_activation activation_function swiglu_limit "
    "sliding_window sliding_window_pattern attention_chunk_size alibi parallel_attn "
    "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar clip_qkv "
    "attention_multiplier embedding_multiplier residual_multiplier logits_scaling logit_scale "
    "rope_local_base_freq rope_interleave attn_temperature_tuning attn_scale floor_scale "
    "use_qk_norm norm_topk_prob num_experts_per_tok scoring_func topk_method topk_group n_group "
    "routed_scaling_factor"
)
"""Keys whose values change what a model computes, but not the shapes of its tensors. Numbers of
heads are among them: four heads of width 8 have the same shape as eight heads of width 4."""

_HEADS = ("num_key_value_heads", "head_dim")
"""Keys that may be null. Their value then follows from other keys."""

ROPE = ("rope_parameters", "rope_scaling")
"""Keys of the rotary settings, in transformers 5 and in version 4."""


def with_values(flavor: Flavor, config: Config, *, where: str) -> Flavor:
    """Return a flavor with the epsilon, rotary settings, routing and heads of a configuration.

    `where` names the configuration in errors, with backticks.

    Raises:
        MismatchError: the native model cannot compute some values. All of them are listed.
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
    """Return a flavor with `tied` and `head_width` taken from a configuration."""
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
    """Return one line for each value that both configurations have and that differs."""
    values = _values(one), _values(other)
    return [
        f"`{key}` is {shortened(value)} and {shortened(values[1][key])}"
        for key, value in values[0].items()
        if key in values[1] and values[1][key] != value
    ]


def untrained_positions(config: Config, seq_len: int | None) -> str | None:
    """Return a note if a configuration allows longer inputs than the `seq_len` tokens of the
    training sequences; None if it does not, or if one of the two lengths is unknown."""
    positions = config.get("max_position_embeddings")
    if seq_len is None or type(positions) is not int or positions <= seq_len:
        return None
    return (
        f"`max_position_embeddings` is {positions}, and this run trained on sequences of {seq_len} "
        "tokens: whatever the model does beyond them, it had learned before"
    )


def no_class(config: Config) -> str | None:
    """Return a note if a configuration of transformers names no class; None if it does."""
    if config.get("architectures") or not config.get("model_type"):
        return None
    return "`config.json` has no `architectures`: vLLM and SGLang choose the model by it"


def _values(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by name. For model types in `_DEFAULTS`, missing keys
    get the values that transformers uses."""
    known = _with_defaults(config)
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    # Set these only for known model types: other models have defaults of their own.
    if str(known.get("model_type")) in _DEFAULTS and type(heads) is int and heads > 0:
        known["num_key_value_heads"] = known.get("num_key_value_heads") or heads
        known["head_dim"] = known.get("head_dim") or (width // heads if width else None)
    values = {
        key: known[key]
        for key in _COMPARED.split()
        if key in known and (known[key] is not None or key not in _HEADS)
    }
    if not known.get("use_sliding_window", True):
        values["sliding_window"] = None
    if {"rope_theta", *ROPE} & config.keys() or str(config.get("model_type")) in _DEFAULTS:
        values |= _rope_values(known)
    return values


def _rope_values(known: Config) -> dict[str, Any]:
    """Return the rotary settings by name. The names are the same for all versions of
    transformers."""
    # `rope_of` rejects null values and partial rotary embeddings: drop the former here, and handle
    # the latter below.
    given = {key: value for key, value in known.items() if value is not None}
    found: Any = next((given.pop(key) for key in ROPE if given.get(key)), {})
    if not isinstance(found, Mapping):
        return {"rope_scaling": found}
    by_layer = {str(k): v for k, v in found.items() if isinstance(v, Mapping)}
    if by_layer:
        # Each type of layer has its own rotary settings.
        return {
            f"{key} of {kind}": value
            for kind, one in by_layer.items()
            for key, value in _rope_values({**given, ROPE[0]: one}).items()
        }
    rope = {key: value for key, value in found.items() if value is not None}
    part = rope.pop("partial_rotary_factor", given.pop("partial_rotary_factor", None))
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta: Any = rope.get("rope_theta", given.get("rope_theta"))
    try:
        theta, scaling = rope_of({**given, ROPE[0]: rope})
        scales = {} if scaling is None else asdict(scaling)
    except FormatError:
        # Native models do not compute this kind of scaling: compare its keys as they are.
        scales = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "type")}
    values: dict[str, Any] = {
        "rope_type": kind,
        **{f"{ROPE[1]}.{key}": one for key, one in scales.items()},
    }
    # Model types outside of `_DEFAULTS` have their own default of `rope_theta`, which is unknown.
    if "rope_theta" in rope or "rope_theta" in given or known.get("model_type") in _DEFAULTS:
        values["rope_theta"] = theta
    return values if part is None else {**values, "partial_rotary_factor": part}
