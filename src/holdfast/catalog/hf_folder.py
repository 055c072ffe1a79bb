"""A Hugging Face folder seen as one manifest, with what its `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from holdfast.catalog.catalog import place
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
    """What a Hugging Face folder holds."""

    manifest: Manifest
    config: Config | None
    """Of the language model; None where there is no `config.json`."""

    quantization: Mapping[str, Any]
    """How the weights were made smaller; empty where they were not."""

    notes: tuple[str, ...]
    """What was left aside, for people."""

    adapter: Mapping[str, Any] | None = None
    """What PEFT says of it, where it holds an adapter and no model."""


def open_hf_folder(store: ReadStore, name: str) -> HFFolder:
    """The manifest and the configuration of a folder. Reads headers only.

    With an index it alone says which files count; without one every `*.safetensors` does.

    Raises:
        NotFoundError: no safetensors there.
        FormatError: files that are not what they claim to be, or links out of the folder.
        DamagedError: files that the index names, or shards of a set, are missing.
    """
    where = place(store, name)
    there = [file for file in store.list(name) if not file.endswith("/")]
    weights = [file for file in there if file.endswith(safetensors.SUFFIX)]
    index = None
    if safetensors.INDEX in there:
        check_inside(store, name, safetensors.INDEX)
        data = _read(store, f"{name}/{safetensors.INDEX}", safetensors.INDEX_BYTES_MAX)
        index = safetensors.read_index(data, where=f"{where}/{safetensors.INDEX}")
    files = weights if index is None else sorted({*index.values()})
    missing = [file for file in files if file not in there]
    if missing:
        raise DamagedError(
            f"`{where}`: {len(missing)} of {len(files)} files of its index are missing: "
            + ", ".join(missing[:10]),
            hint="download the folder again",
        )
    if index is None and (lacking := safetensors.missing_shards(weights)):
        raise DamagedError(
            f"`{where}` has no index, and shards are missing: {', '.join(lacking[:10])}",
            hint="download the folder again",
        )
    if not files:
        raise NotFoundError(
            f"`{where}` holds no `*{safetensors.SUFFIX}`",
            hint=f"found: {', '.join(there[:10]) or 'nothing'}",
        )
    parts = {file: _open_file(store, name, file) for file in files}
    stray = [file for file in weights if file not in files]
    notes = [f"`{file}` is not in the index, and was left aside" for file in stray]
    whole = read_config(store, name) if CONFIG in there else None
    is_adapter = files == [ADAPTER] and ADAPTER_CONFIG in there
    return HFFolder(
        safetensors.joined(parts, index, where=where),
        None if whole is None else of_language_model(whole),
        {} if whole is None else whole.get("quantization_config") or {},
        tuple(notes),
        read_config(store, name, ADAPTER_CONFIG) if is_adapter else None,
    )


def read_config(store: ReadStore, name: str, file: str = CONFIG) -> dict[str, Any]:
    """What `config.json`, or another such file, says, as it is.

    Raises:
        NotFoundError: there is none.
        FormatError: it is no table.
    """
    where = f"{place(store, name)}/{file}"
    check_inside(store, name, file)
    if store.size(f"{name}/{file}") > CONFIG_BYTES_MAX:
        raise FormatError(f"`{where}` has more than {CONFIG_BYTES_MAX} bytes")
    try:
        config = safetensors.parse_json(_read(store, f"{name}/{file}", CONFIG_BYTES_MAX))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{where}` is no configuration: {error}") from error
    return config


def of_language_model(config: Config) -> Config:
    """The part of a configuration that is about the language model, in one table."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: value for key, value in config.items() if not isinstance(value, dict)}
    tied = (
        {}
        if "tie_word_embeddings" not in outer
        else {"tie_word_embeddings": outer["tie_word_embeddings"]}
    )
    return {**outer, **text, **tied, "model_type": config.get("model_type")}


def _read(store: ReadStore, key: str, nbytes_max: int) -> bytes:
    return store.read(key, 0, min(store.size(key), nbytes_max + 1))


def check_inside(store: ReadStore, name: str, file: str) -> None:
    """Make sure that a file of a folder is no link to a place outside of it: a stranger's folder
    could carry whatever its reader may read. The layout of the hub's cache is the exception.

    Raises:
        FormatError: it is such a link.
    """
    if store.leads_out(name, file):
        raise FormatError(
            f"`{place(store, name)}/{file}` is a link to a place outside of its folder",
            hint="if it is yours, put a copy of the file in the place of the link: cp -L",
        )


def _open_file(store: ReadStore, name: str, file: str) -> Manifest:
    check_inside(store, name, file)
    key = f"{name}/{file}"
    fetch = partial(_fetch, store, key)
    where = f"{place(store, name)}/{file}"
    return safetensors.read_file(fetch, store.size(key), file=file, where=where)


def _fetch(store: ReadStore, key: str, offset: int, nbytes: int) -> bytes:
    return store.read(key, offset, offset + nbytes)
