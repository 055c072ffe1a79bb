"""Describe the model of a checkpoint, for `holdfast show`."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

from holdfast.catalog.hf_folder import of_language_model
from holdfast.catalog.open_any import OpenCheckpoint
from holdfast.hf.dialects import dialect_of
from holdfast.hf.values import ROPE

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
)
"""Keys of `config.json` to print, if the configuration has them."""

_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias")
"""Keys of `adapter_config.json` to print."""

_NAMES = {
    "hf": "of Hugging Face",
    "meta": "of Meta, as in torchtune and TorchTitan up to 0.2",
    "titan": "of TorchTitan from 0.3 on",
}
"""Description of each dialect of tensor names, for messages."""


def config_of(checkpoint: OpenCheckpoint) -> Mapping[str, Any] | None:
    """Return the `config.json` in a Hugging Face folder or in a manifest; None if there is none."""
    if checkpoint.hf is not None:
        return checkpoint.hf.config
    return checkpoint.manifest.model or None


def description(checkpoint: OpenCheckpoint) -> list[str]:
    """Return lines of text on the model: class, sizes, tensor names, as far as they are known."""
    lines = []
    config = config_of(checkpoint)
    adapter = None if checkpoint.hf is None else checkpoint.hf.adapter
    if adapter is not None:
        base = shortened(adapter.get("base_model_name_or_path"))
        values = [_spelled(key, adapter[key]) for key in _ADAPTER if adapter.get(key) is not None]
        lines = [f"adapter of PEFT for {base}: {', '.join(values)}"]
    if config is not None:
        text = of_language_model(config)
        sizes = [_spelled(key, text[key]) for key in _SIZES if text.get(key) is not None]
        rope = [_spelled(key, text[key]) for key in ROPE if isinstance(text.get(key), Mapping)]
        rows = [f"configuration: {_class_of(config)}", f"  {', '.join(sizes)}", *rope]
        lines += [row.rstrip() for row in rows if row.strip()]
    dialect = dialect_of([str(entry.path[-1]) for entry in checkpoint.manifest.tensors.values()])
    return lines + ([f"tensor names: {_NAMES[dialect]}"] if dialect is not None else [])


def _class_of(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else config.get("_class_name")
    kinds = [str(one)[:100] for one in (name, config.get("model_type")) if isinstance(one, str)]
    return ", ".join(kinds) or "of an unknown class"


def _spelled(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        inner = (_spelled(str(name), one) for name, one in value.items() if one is not None)
        return f"  {key}: {', '.join(inner)}"
    return f"{key} {value if isinstance(value, bool | int | float) else shortened(value)}"
