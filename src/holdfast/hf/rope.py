"""Rotary frequencies of a model, from its `config.json` and back.

The kinds of scaling and their keys are those of transformers (`modeling_rope_utils.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from holdfast.errors import FormatError

Config = Mapping[str, Any]
"""Contents of `config.json`."""


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Scaling of rotary frequencies in Llama 3.1, from 8192 to 131072 positions."""

    factor: float
    """Factor by which long wavelengths are stretched."""

    low_freq_factor: float = 1.0
    """Wavelengths above `original_seq_len / low_freq_factor` are stretched by the full `factor`."""

    high_freq_factor: float = 4.0
    """Wavelengths below `original_seq_len / high_freq_factor` are not stretched."""

    original_seq_len: int = 8192
    """Number of positions before the scaling."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Division of all rotary frequencies by a constant."""

    factor: float
    """Divisor of the frequencies."""


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """Larger base of the rotary frequencies for sequences beyond the original length."""

    factor: float
    """Rate at which the base grows with the length of the sequence: see
    `trainer.model.rotary_table`."""

    original_seq_len: int
    """Number of positions up to which the frequencies are not scaled."""


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): low frequencies are divided, high ones kept."""

    factor: float
    """Divisor of the low frequencies."""

    original_seq_len: int
    """Number of positions before the scaling."""

    attention_factor: float
    """Factor by which all cosines and sines are multiplied."""

    beta_fast: float = 32.0
    """Frequencies with more turns than this over the original positions are kept."""

    beta_slow: float = 1.0
    """Frequencies with fewer turns than this are divided by the full `factor`."""

    truncate: bool = True
    """Whether the limits of the ramp between divided and kept frequencies are rounded to whole
    indices."""


Scaling = Llama3Scaling | LinearScaling | DynamicScaling | YarnScaling
"""Scaling of rotary frequencies."""

_POSITIONS = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"

THETA = 10000.0
"""Base of the rotary frequencies in a `config.json` without one."""


def rope_of(config: Config) -> tuple[float, Scaling | None]:
    """Return base and scaling of the rotary frequencies.

    Raises:
        FormatError: the kind of scaling is not supported, or a value is missing or absurd.
    """
    # transformers 5 has all values in one dict. Version 4 has the base beside `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _absurd("rope_parameters", "an object", rope)
    theta = _number(config, "rope_theta", THETA, positive=True)
    theta = _number(rope, "rope_theta", theta, positive=True)
    partial = _number(rope, "partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if partial != 1.0:
        raise _absurd("partial_rotary_factor", "1", partial)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if not isinstance(kind, str) or kind not in _PARSERS:
        raise _absurd("rope_type", f"default, {', '.join(_PARSERS)}", kind)
    known = {**rope, _POSITIONS: _positions(config, _POSITIONS, default=0)}
    if _ORIGINAL in config:
        known[_ORIGINAL] = config[_ORIGINAL]
    return theta, _PARSERS[kind](known)


def rope_scaling_of(scaling: Scaling) -> dict[str, Any]:
    """Return the contents of the key `rope_scaling` in `config.json`."""
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            # The original length is stored as `max_position_embeddings`.
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                _ORIGINAL: scaling.original_seq_len,
            }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        _ORIGINAL: scaling.original_seq_len,
    }


def _linear(rope: Config) -> Scaling:
    return LinearScaling(_number(rope, "factor", positive=True))


def _dynamic(rope: Config) -> Scaling:
    return DynamicScaling(_number(rope, "factor", positive=True), rope[_POSITIONS])


def _llama3(rope: Config) -> Scaling:
    return Llama3Scaling(
        factor=_number(rope, "factor", positive=True),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_seq_len=_positions(rope, _ORIGINAL, default=rope[_POSITIONS]),
    )


def _yarn(rope: Config) -> Scaling:
    original = _positions(rope, _ORIGINAL, default=rope[_POSITIONS])
    factor = _number(rope, "factor", rope[_POSITIONS] / max(original, 1), positive=True)
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = _mscale(factor, 1.0)
    if mscale and mscale_all:
        attention = _mscale(factor, _number(rope, "mscale")) / _mscale(
            factor, _number(rope, "mscale_all_dim")
        )
    return YarnScaling(
        factor=factor,
        original_seq_len=original,
        attention_factor=_number(rope, "attention_factor", attention),
        beta_fast=_number(rope, "beta_fast", 32.0) or 32.0,
        beta_slow=_number(rope, "beta_slow", 1.0) or 1.0,
        truncate=rope.get("truncate", True) is not False,
    )


_PARSERS: Mapping[str, Callable[[Config], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""Function that parses each kind of scaling, by its `rope_type`."""


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _positions(config: Config, key: str, *, default: int) -> int:
    """Return a number of positions, or `default` if the key is missing. A null value is refused."""
    if key not in config:
        return default
    number = int(_number(config, key))
    if number < 1:
        raise _absurd(key, "a number of at least 1", config[key])
    return number


def _number(
    config: Config, key: str, default: float | None = None, *, positive: bool = False
) -> float:
    """Return a number, or `default` if there is none. `positive`: whether 0 is refused."""
    value: Any = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 <= value < math.inf or (positive and not value):
        raise _absurd(key, f"a number {'above' if positive else 'of at least'} 0", value)
    return float(value)


def _absurd(key: str, expected: str, found: object) -> FormatError:
    return FormatError(f"`{key}` must be {expected}, found: {shortened(found)}")
