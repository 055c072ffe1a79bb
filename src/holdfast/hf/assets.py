"""Files beside the weights in a Hugging Face folder: configuration, tokenizer, templates, index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from holdfast.catalog.catalog import check_inside
from holdfast.catalog.hf_folder import CONFIG, QUANTIZATION, is_of_diffusers, read_config
from holdfast.catalog.paths import open_for_reading
from holdfast.format.safetensors import INDEX_SUFFIX
from holdfast.storage.store import Creating, ReadStore, Store

_WEIGHTS = (
    "*.safetensors *.index.json *.bin *.pt *.pth *.ckpt *.gguf *.onnx *.h5 *.msgpack *.npz "
    "*.distcp *.lock *.incomplete"
)
"""Patterns of files that an export does not copy: weights in any format, leftovers of
downloads."""

_TEMPLATES = "additional_chat_templates/"

GENERATION_CONFIG = "generation_config.json"

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of special tokens, in `config.json` and `generation_config.json`."""

COPIED_BYTES_MAX = 200_000_000
"""Largest file that an export copies. The largest tokenizers have a tenth of this size."""


def files_beside(
    config: Mapping[str, Any], assets: str | None, dtype: str, index: bytes | None
) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of each file of an export besides the weights.

    `assets`: folder from which all files but weights and `config.json` are copied, or None.
    `dtype`: dtype of the weights, for `config.json`. The index comes last: a folder is not complete
    without it.
    """
    if assets is None:
        yield CONFIG, config_bytes(config, dtype)
    else:
        store, folder = open_for_reading(assets)
        config = {**config, **_token_ids(store, folder, config)}
        yield CONFIG, config_bytes(config, dtype)
        yield from _copied(store, folder)
    if index is not None:
        yield stem_of(config) + INDEX_SUFFIX, index


def stem_of(config: Mapping[str, Any]) -> str:
    """Return how the names of weight files must begin, so that the loader of the model finds
    them."""
    return "diffusion_pytorch_model" if is_of_diffusers(config) else "model"


def _token_ids(store: ReadStore, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens that `config` lacks and the folder's `generation_config.json` has.
    Return an empty dict if the folder has a `config.json` of its own.

    Without these tokens, transformers and other loaders use their default tokens, which are wrong
    here.
    """
    files = store.list(folder)
    if CONFIG in files or GENERATION_CONFIG not in files:
        return {}
    found = read_config(store, folder, GENERATION_CONFIG)
    return {key: found[key] for key in TOKEN_IDS if key in found and key not in config}


def write_small(
    store: Store, files: Creating, folder: str, contents: Iterable[tuple[str, bytes]]
) -> None:
    """Write small files below `folder` of `store`. `files`: object that creates the files.
    `contents`: path below `folder` and bytes of each file."""
    for file, data in contents:
        below = file.rpartition("/")[0]
        if below and f"{below}/" not in store.list(folder):
            store.make_folder(f"{folder}/{below}")
        with files.create(f"{folder}/{file}", len(data)) as writer:
            writer.write(0, [data])
        if below:
            store.sync(f"{folder}/{below}")


def config_bytes(config: Mapping[str, Any], dtype: str) -> bytes:
    """Return the bytes of a `config.json` for unquantized weights in `dtype`."""
    return (json.dumps(_with_dtype(config, dtype), indent=2, ensure_ascii=False) + "\n").encode()


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key not in QUANTIZATION}
    if is_of_diffusers(config):
        return changed  # diffusers takes the dtype from the weights, and warns about unknown keys.
    # transformers 5 renamed `torch_dtype` to `dtype`, and reads both keys.
    keys = [key for key in ("dtype", "torch_dtype") if key in changed]
    nested = isinstance(changed.get("text_config"), dict)
    if nested:
        changed["text_config"] = _with_dtype(changed["text_config"], dtype)
    for key in keys or ([] if nested else ["torch_dtype"]):
        changed[key] = dtype
    return changed


def _copied(store: ReadStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of each file that an export copies from its assets folder."""
    files = store.list(folder)
    if _TEMPLATES in files:
        below = store.list(f"{folder}/{_TEMPLATES.rstrip('/')}")
        files = [*files, *(_TEMPLATES + file for file in below)]
    for file in files:
        if file == CONFIG or file.startswith(".") or file.endswith("/"):
            continue
        if any(fnmatchcase(file, pattern) for pattern in _WEIGHTS.split()):
            continue
        check_inside(store, folder, file)
        size = store.size(f"{folder}/{file}")
        if size <= COPIED_BYTES_MAX:
            yield file, store.read(f"{folder}/{file}", 0, size)
