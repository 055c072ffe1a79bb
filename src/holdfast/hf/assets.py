"""What lies beside the weights in a Hugging Face folder: configuration, tokenizer, templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from holdfast.catalog.hf_folder import CONFIG, check_inside
from holdfast.storage.store import ReadStore

_WEIGHTS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx"),
    *("*.h5", "*.msgpack", "*.npz", "*.distcp", "*.lock", "*.incomplete"),
)
"""Of whatever format: an export has its own."""

_TEMPLATES = "additional_chat_templates/"

COPIED_BYTES_MAX = 200_000_000
"""Of one file: the largest tokenizers have a tenth of it."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def beside_weights(store: ReadStore, name: str) -> Iterator[tuple[str, bytes]]:
    """Every file of a folder that an export takes along as it is, one at a time.

    Raises:
        FormatError: one of them is a link out of the folder, or no plain file.
    """
    for file in store.list(name):
        if file == _TEMPLATES:
            for below in store.list(f"{name}/{_TEMPLATES.rstrip('/')}"):
                yield from _file(store, name, _TEMPLATES + below)
        elif file != CONFIG:
            yield from _file(store, name, file)


def config_bytes(config: Mapping[str, Any], dtype: str) -> bytes:
    """`config.json` for weights that are stored, unquantized, in `dtype`."""
    return (json.dumps(_stored_as(config, dtype), indent=2, ensure_ascii=False) + "\n").encode()


def _stored_as(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    said = {key: value for key, value in config.items() if key != "quantization_config"}
    # Two names of one key: transformers renamed it in version 5, and reads both.
    spelled = [key for key in ("dtype", "torch_dtype") if key in said]
    nested = isinstance(said.get("text_config"), dict)
    if nested:
        said["text_config"] = _stored_as(said["text_config"], dtype)
    for key in spelled or ([] if nested else ["torch_dtype"]):
        said[key] = dtype
    return said


def _file(store: ReadStore, name: str, file: str) -> Iterator[tuple[str, bytes]]:
    plain = not file.endswith("/") and not file.startswith(".")
    if plain and not any(fnmatchcase(file, pattern) for pattern in _WEIGHTS):
        key = f"{name}/{file}"
        check_inside(store, name, file)
        size = store.size(key)
        if size <= COPIED_BYTES_MAX:
            yield file, store.read(key, 0, size)
