"""Small configurations of every architecture of transformers.

A configuration starts from the defaults of its class. Every width is divided by one factor, since
widths depend on each other; every count of layers, experts and words is cut. Values that the
defaults leave open are filled. No rule knows an architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LAYERS = ("layers", "n_layer", "num_hidden_layers", "depth", "num_blocks", "iou_head_depth")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("size", "dim", "width", "d_model", "n_embd", "channels", "d_ff", "d_kv", "n_inner")
_KEPT = ("image_size", "patch_size", "kernel_size", "window_size", "block_size", "chunk_size")

_WORDS = 128
"""Size of every vocabulary."""

_NUMBERED = re.compile(r"(stage)(\d+)")
"""Name of a stage or layer of a backbone."""

_INDICES = ("out_indices", "out_features", "feature_layer", "feature_layers", "_indexes")
"""Ends of keys whose lists name layers."""

_PER_LAYER = "per_layer_config"
"""Key of a dict by numbers of layers."""

_OPEN = {"prediction_length": 8, "pad_token_id": 0, "vocab_size": _WORDS}
"""Values for keys that defaults leave open."""

_HEADS = ("heads", "n_head", "num_groups", "head_num")
"""Ends of keys that count heads."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a configuration is made smaller."""

    factor: int
    """Divisor of all widths."""

    num_layers: int
    """Number of layers; 0: as by default."""

    fills: bool = False
    """Whether values that are None are filled, and numbers of layers moved into the new range."""

    few_heads: bool = False
    """Whether numbers of heads and groups become 2, and widths of heads follow."""

    all_numbers: bool = False
    """Whether numbers of other kinds above 64 are divided too."""


_BASIC = ((16, 2), (8, 2), (32, 2), (4, 2), (16, 4), (4, 4), (16, 0), (1, 2))


def cuts() -> Iterator[Cut]:
    """Yield cuts to try: those that change the least kinds of values first."""
    for fills, few_heads, all_numbers in (
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    ):
        for factor, num_layers in _BASIC:
            yield Cut(factor, num_layers, fills, few_heads, all_numbers)


def smaller(values: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Return a configuration with smaller sizes."""
    found: dict[str, Any] = _smaller(values, cut)
    return found


def _smaller(value: Any, cut: Cut, key: str = "") -> Any:
    if isinstance(value, dict):
        after = {k: _smaller(v, cut, str(k)) for k, v in value.items()}
        after = _with_lists_cut(value, after)
        if cut.fills:
            after = _moved(value, _filled(after))
        return _with_few_heads(after) if cut.few_heads else after
    if isinstance(value, list):
        if key == "depths" and cut.num_layers:
            return [1 for _ in value]
        return [_smaller(item, cut, key) for item in value]
    if type(value) is not int:
        return value
    return _smaller_number(value, cut, key)


def _smaller_number(value: int, cut: Cut, key: str) -> int:
    if "vocab_size" in key or key == "codebook_size":
        return min(value, _WORDS)
    if key.endswith(("token_id", "token_index", "_id")):
        # Special tokens stay distinct: outputs of models that look for them would differ.
        return value if value < _WORDS // 2 else _WORDS // 2 + sum(map(ord, key)) % (_WORDS // 2)
    if cut.num_layers and key.endswith(_LAYERS):
        return min(value, cut.num_layers)
    if key in _EXPERTS:
        return min(value, 4)
    if key in ("num_experts_per_tok", "topk_group", "n_group", "num_experts_per_token"):
        return min(value, 2) if key.startswith("num") else 1
    if key.startswith("max_") and "position" in key:
        return min(value, 256)
    if key == "image_size":
        return max(32, min(value, 64))
    if any(kept in key for kept in _KEPT) or value < 16:
        return value
    if key == "mrope_section" or any(word in key for word in _WIDTHS):
        return max(value // cut.factor, 2) if value % cut.factor == 0 else value
    return max(value // cut.factor, 4) if cut.all_numbers and value > 64 else value


def _with_lists_cut(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with lists of one item per layer cut to the number of layers."""
    for key in before:
        cut = str(key).endswith(_LAYERS) and type(before[key]) is int
        if cut and after[key] < before[key]:
            for other, items in after.items():
                if isinstance(items, list) and len(items) == before[key]:
                    after[other] = items[: after[key]]
    return after


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with values for keys that are None, where it needs them."""
    filled = {k: _OPEN.get(k) if v is None else v for k, v in values.items()}
    heads, width = filled.get("num_attention_heads"), filled.get("hidden_size")
    if type(heads) is int:
        for key in ("num_key_value_heads", "head_dim"):
            if key in filled and filled[key] is None:
                filled[key] = heads if key != "head_dim" else (width or 0) // heads or None
    return filled


def _moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration whose lists of layers lie in the new number of layers."""
    sizes = [(before[k], after[k]) for k in before if str(k).endswith(_LAYERS)]
    old, new = next(((a, b) for a, b in sizes if type(a) is int and a > b), (0, 0))
    for key, value in after.items() if old else ():
        if str(key).endswith(_INDICES) and isinstance(value, list):
            after[key] = [*dict.fromkeys(_moved_layer(item, old, new) for item in value)]
        elif key == "stage_names":
            after[key] = None
        elif key == _PER_LAYER and isinstance(value, dict):
            after[key] = {k: v for k, v in value.items() if int(k) < new}
    return after


def _moved_layer(layer: Any, old: int, new: int) -> Any:
    """Return the layer at the same share of the depth."""
    if type(layer) is int:
        return layer if layer < 0 else -(-layer * new // old)
    match = _NUMBERED.fullmatch(str(layer))
    return layer if match is None else f"{match[1]}{-(-int(match[2]) * new // old)}"


def _with_few_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with two heads in all attention, which any width suits."""
    few = {
        key: 2 if str(key).endswith(_HEADS) and type(value) is int else value
        for key, value in values.items()
    }
    for key, total in (("head_dim", "hidden_size"), ("d_head", "d_model")):
        if type(few.get(key)) is int and type(few.get(total)) is int:
            few[key] = few[total] // 2
    return few
