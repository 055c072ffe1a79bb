"""Opens Hugging Face folders: one manifest for all files, and the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.catalog import location
from holdfast.errors import DamagedError, FormatError, NotFoundError
from holdfast.format import safetensors
from holdfast.format.manifest import Manifest
from holdfast.storage.store import ReadStore

Config = Mapping[str, Any]
"""Contents of a `config.json`."""

CONFIG = "config.json"
CONFIG_BYTES_MAX = 10_000_000
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class HFFolder:
    """Contents of a Hugging Face folder."""

    manifest: Manifest
    config: Config | None
    """Configuration of the language model; None without a `config.json`."""

    quantization: Mapping[str, Any]
    """Quantization of the weights; empty if there is none."""

    notes: tuple[str, ...]
    """Files that are ignored, for messages."""

    adapter: Mapping[str, Any] | None = None
    """Configuration of PEFT, if the folder holds an adapter and no model."""


def open_hf_folder(store: ReadStore, name: str) -> HFFolder:
    """Read the headers and the configuration of a folder.

    The weights are the files in the index; without an index, every `*.safetensors`.

    Raises:
        NotFoundError: the folder has no safetensors.
        FormatError: a file is malformed, or a link out of the folder.
        DamagedError: files in the index, or shards of a set, are missing.
    """
    where = location(store, name)
    present = [file for file in store.list(name) if not file.endswith("/")]
    weights = [file for file in present if file.endswith(safetensors.SUFFIX)]
    index = None
    if safetensors.INDEX in present:
        check_inside(store, name, safetensors.INDEX)
        index = read_weights_index(store, name, safetensors.INDEX)
    files = weights if index is None else sorted({*index.values()})
    missing = [file for file in files if file not in present]
    if missing:
        raise DamagedError(
            f"`{where}`: {len(missing)} of {len(files)} files of its index are missing: "
            + ", ".join(missing[:10]),
            hint="download the folder again",
        )
    if index is None and (shards := safetensors.missing_shards(weights)):
        raise DamagedError(
            f"`{where}` has no index, and shards are missing: {', '.join(shards[:10])}",
            hint="download the folder again",
        )
    if not files:
        raise NotFoundError(
            f"`{where}` holds no `*{safetensors.SUFFIX}`",
            hint=f"found: {', '.join(present[:10]) or 'nothing'}",
        )
    manifests = {file: _open_file(store, name, file) for file in files}
    ignored = [file for file in weights if file not in files]
    config = read_config(store, name) if CONFIG in present else None
    is_adapter = files == [ADAPTER] and ADAPTER_CONFIG in present
    return HFFolder(
        manifest=safetensors.joined(manifests, index, where=where),
        config=None if config is None else of_language_model(config),
        quantization={} if config is None else quantization_of(config),
        notes=tuple(f"`{file}` is not in the index, and is ignored" for file in ignored),
        adapter=read_config(store, name, ADAPTER_CONFIG) if is_adapter else None,
    )


def read_config(store: ReadStore, name: str, file: str = CONFIG) -> dict[str, Any]:
    """Read `config.json`, or another file of JSON, unchanged. Raises a FormatError if it is no JSON
    object, or too large."""
    where = f"{location(store, name)}/{file}"
    check_inside(store, name, file)
    if store.size(f"{name}/{file}") > CONFIG_BYTES_MAX:
        raise FormatError(f"`{where}` has more than {CONFIG_BYTES_MAX} bytes")
    try:
        config = safetensors.parse_json(_read(store, f"{name}/{file}", CONFIG_BYTES_MAX))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{where}` is no configuration: {error}") from error
    return config


def of_language_model(config: Config) -> Config:
    """The language model's part of a multimodal configuration, as one flat configuration."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: value for key, value in config.items() if not isinstance(value, dict)}
    # The outer configuration decides on tied embeddings, on the class and on the type.
    whole = {key: outer[key] for key in ("tie_word_embeddings", "architectures") if key in outer}
    return {**outer, **text, **whole, "model_type": config.get("model_type")}


def quantization_of(config: Config) -> Mapping[str, Any]:
    """The quantization of the weights, which multimodal models have in `text_config`; empty if
    there is none."""
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if one.get(key):
                found: Mapping[str, Any] = one[key]
                return found
    return {}


def read_weights_index(store: ReadStore, name: str, file: str) -> dict[str, str]:
    """Read the index of a folder: the file of each tensor."""
    data = _read(store, f"{name}/{file}", safetensors.INDEX_BYTES_MAX)
    return safetensors.read_index(data, where=f"{location(store, name)}/{file}")


def fetcher(store: ReadStore, key: str) -> Callable[[int, int], bytes]:
    """A function that reads `nbytes` at `offset` of a file."""
    return lambda offset, nbytes: store.read(key, offset, offset + nbytes)


def _read(store: ReadStore, key: str, nbytes_max: int) -> bytes:
    return store.read(key, 0, min(store.size(key), nbytes_max + 1))


def check_inside(store: ReadStore, name: str, file: str) -> None:
    """Raise a FormatError if a file is a link to a place outside of its folder.

    A stranger's folder could otherwise include private files of its reader. The cache of the
    Hugging Face hub, whose files are links, is the exception.
    """
    if store.leads_out(name, file):
        raise FormatError(
            f"`{location(store, name)}/{file}` is a link to a place outside of its folder",
            hint="if the link is yours, replace it by a copy of the file: cp -L",
        )


def _open_file(store: ReadStore, name: str, file: str) -> Manifest:
    check_inside(store, name, file)
    key = f"{name}/{file}"
    where = f"{location(store, name)}/{file}"
    return safetensors.read_file(fetcher(store, key), store.size(key), file=file, where=where)
