"""Opens Hugging Face folders: makes one manifest for all weight files, and reads the configuration.

The weights are safetensors files or, in older folders, files of `torch.save` that end in `.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.catalog.catalog import check_inside, location
from holdfast.catalog.source import fetcher
from holdfast.errors import DamagedError, FormatError, NotFoundError
from holdfast.format import safetensors, torchfile
from holdfast.format.manifest import Manifest
from holdfast.format.torchfile import TorchFile
from holdfast.format.untrusted import check_file_name
from holdfast.storage.store import ReadStore

Config = Mapping[str, Any]
"""Contents of a `config.json`."""

CONFIG = "config.json"
CONFIG_BYTES_MAX = 10_000_000
ADAPTER = "adapter_model.safetensors"
ADAPTER_BIN = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
MODULES = "modules.json"
SINGLES = (
    safetensors.SINGLE,
    f"diffusion_pytorch_model{safetensors.SUFFIX}",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Names that transformers and diffusers give to weights in a single file."""

BIN_INDEX = "pytorch_model.bin.index.json"

QUANTIZATION = ("quantization_config", "compression_config")
"""Keys of `config.json` that describe quantized weights. Either may be used."""

_BIN = re.compile(r"(?!.*_rank[0-9]+\.bin)(.*pytorch_model|adapter_model).*\.bin", re.DOTALL)
"""Names of weights that `torch.save` wrote. Other `.bin` files hold an optimizer, arguments or a
random state."""


@dataclass(frozen=True, slots=True)
class HFFolder:
    """Contents of a Hugging Face folder."""

    manifest: Manifest
    config: Config | None
    """Configuration of the language model; None without a `config.json`."""

    quantization: Mapping[str, Any]
    """Quantization of the weights; empty if there is none."""

    notes: tuple[str, ...]
    """Notes for the user, such as ignored files."""

    adapter: Mapping[str, Any] | None = None
    """Contents of `adapter_config.json`, if the folder holds an adapter and no model; else None."""

    torch_files: Mapping[str, TorchFile] = field(default_factory=dict)
    """Contents of each `.bin` file; empty if the weights are safetensors."""

    @property
    def strides(self) -> dict[str, tuple[int, ...]]:
        """Strides, in elements, of the tensors that are not row-major. Only `.bin` files have such
        tensors."""
        return {n: one for file in self.torch_files.values() for n, one in file.strides.items()}


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of a folder's weights."""

    files: tuple[str, ...]
    index: str
    """Name of the index that lists the files; empty if there is none."""

    notes: tuple[str, ...]
    """Notes for the user on files that are ignored."""

    file_of: Mapping[str, str] | None = None
    """File of each tensor according to the index; None without an index."""

    @property
    def is_adapter(self) -> bool:
        return self.files in ((ADAPTER,), (ADAPTER_BIN,))


def has_weights(names: Collection[str]) -> bool:
    """Return whether there are weights among files of these names."""
    return has_safetensors(names) or any(map(_BIN.fullmatch, names)) or BIN_INDEX in names


def has_safetensors(names: Collection[str]) -> bool:
    """Return whether there are safetensors among files of these names. If so, `.bin` files are
    ignored."""
    suffixes = (safetensors.SUFFIX, safetensors.INDEX_SUFFIX)
    return any(name.endswith(suffixes) for name in names)


def weights_in(store: ReadStore, name: str) -> Weights:
    """Choose the weight files of a folder, as transformers does.

    With an index: the files that it lists, unless there is a `model.safetensors` that it does not
    list; then this file alone. Without an index: a single file with a usual name such as
    `model.safetensors`, else all weight files except adapters.

    Raises:
        FormatError: the index is malformed, or is a link out of the folder.
    """
    present = [file for file in store.list(name) if not file.endswith("/")]
    index_file, single = safetensors.INDEX, safetensors.SINGLE
    weights = [file for file in present if file.endswith(safetensors.SUFFIX)]
    if not has_safetensors(present):
        index_file, single = BIN_INDEX, ""
        weights = [file for file in present if _BIN.fullmatch(file)]
    if index_file not in present:
        return _without_index(weights)
    check_inside(store, name, index_file)
    file_of = _read_weights_index(store, name, index_file)
    files = {*file_of.values()}
    if single in present and single not in files:
        notes = [f"`{index_file}` does not name `{single}`, and is ignored, as by transformers"]
        notes += [f"`{file}` is ignored too" for file in weights if file != single]
        return Weights((single,), "", tuple(notes))
    ignored = [file for file in weights if file not in files]
    notes = [f"`{file}` is not in the index, and is ignored" for file in ignored]
    return Weights(tuple(sorted(files)), index_file, tuple(notes), file_of)


def _without_index(weights: list[str]) -> Weights:
    """Choose from `weights`, the weight files of a folder without an index: a single file with a
    name in `SINGLES`, else all files except adapters. An adapter is chosen if the folder has
    nothing else. Files beside a single one are other variants of the weights, or formats of other
    programs."""
    chosen = next((file for file in SINGLES if file in weights), None)
    others = [file for file in weights if file not in (ADAPTER, ADAPTER_BIN)]
    if chosen is None and others and len(others) < len(weights):
        notes = [
            f"`{file}` is an adapter, and is ignored" for file in weights if file not in others
        ]
        return Weights(tuple(others), "", tuple(notes))
    if chosen is None or len(weights) == 1:
        return Weights(tuple(weights), "", ())
    ignored = [file for file in weights if file != chosen]
    notes = [f"`{file}` is beside `{chosen}`, and is ignored" for file in ignored]
    return Weights((chosen,), "", tuple(notes))


def open_hf_folder(store: ReadStore, name: str) -> HFFolder:
    """Read the headers of the weight files in a folder, and its configuration.

    Raises:
        NotFoundError: the folder has no weights.
        FormatError: a file is malformed, or is a link out of the folder.
        DamagedError: a file that the index lists is missing, or one of several numbered shards.
    """
    where = location(store, name)
    present = [file for file in store.list(name) if not file.endswith("/")]
    weights = weights_in(store, name)
    files = weights.files
    missing = [file for file in files if file not in present]
    if missing:
        raise DamagedError(
            f"`{where}`: {len(missing)} of {len(files)} files of its index are missing: "
            + ", ".join(missing[:10]),
            hint="download the folder again",
        )
    if not weights.index and (shards := safetensors.missing_shards(files)):
        raise DamagedError(
            f"`{where}` has no index, and shards are missing: {', '.join(shards[:10])}",
            hint="download the folder again",
        )
    if not files:
        raise NotFoundError(
            f"`{where}` holds no `*{safetensors.SUFFIX}`",
            hint=f"found: {', '.join(present[:10]) or 'nothing'}",
        )
    torch_files: dict[str, TorchFile] = {}
    manifests: dict[str, Manifest] = {}
    for file in files:
        if file.endswith(safetensors.SUFFIX):
            manifests[file] = _open_file(store, name, file)
        else:
            torch_files[file] = open_torch_file(store, name, file)
            manifests[file] = torch_files[file].manifest
    config = read_config(store, name) if CONFIG in present else None
    is_adapter = weights.is_adapter and ADAPTER_CONFIG in present
    return HFFolder(
        manifest=safetensors.joined(manifests, weights.file_of, where=where),
        config=None if config is None else of_language_model(config),
        quantization={} if config is None else quantization_of(config),
        notes=(*weights.notes, *_notes_on_modules(store, name, present)),
        adapter=read_config(store, name, ADAPTER_CONFIG) if is_adapter else None,
        torch_files=torch_files,
    )


def _notes_on_modules(store: ReadStore, name: str, present: Collection[str]) -> tuple[str, ...]:
    """Return a note on each module of a sentence-transformers model that has weights in a folder of
    its own."""
    if MODULES not in present:
        return ()
    folders = [folder for folder in modules_of(store, name) if folder]
    return tuple(
        f"`{folder}` is a module of its own, which `{MODULES}` names: "
        f"holdfast show {location(store, name)}/{folder}"
        for folder in folders
        if has_weights(store.list(f"{name}/{folder}"))
    )


def modules_of(store: ReadStore, name: str) -> list[str]:
    """Return the existing folders that `modules.json` of sentence-transformers lists. An empty
    string stands for the folder of `modules.json` itself.

    Raises:
        FormatError: the file is malformed, or lists folders outside of its own.
    """
    where = f"{location(store, name)}/{MODULES}"
    check_inside(store, name, MODULES)
    try:
        modules = safetensors.parse_json(_read(store, f"{name}/{MODULES}", CONFIG_BYTES_MAX))
        paths = [str(module["path"]).strip("/") for module in modules]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FormatError(f"`{where}` is no list of modules: {error}") from error
    for path in filter(None, paths):
        check_file_name(path, where)
    folders = {*store.list(name)}
    return [path for path in dict.fromkeys(paths) if not path or f"{path}/" in folders]


def read_config(store: ReadStore, name: str, file: str = CONFIG) -> dict[str, Any]:
    """Read a file that holds a JSON object, by default `config.json`. Raises a FormatError if it
    holds something else, or is too large."""
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
    """Return the configuration of the language model in a multimodal configuration, as one flat
    dict. Other configurations are returned unchanged."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    outer = {key: value for key, value in config.items() if not isinstance(value, dict)}
    # For these keys and for `model_type`, the outer configuration counts, not `text_config`.
    whole = {key: outer[key] for key in ("tie_word_embeddings", "architectures") if key in outer}
    return {**outer, **text, **whole, "model_type": config.get("model_type")}


def is_of_diffusers(config: Config) -> bool:
    """Return whether a configuration is of a diffusers model. Such a configuration has no
    `model_type`."""
    return "_diffusers_version" in config and "model_type" not in config


def quantization_of(config: Config) -> Mapping[str, Any]:
    """Return the part of a configuration that says how the weights are quantized; empty if there is
    none. Multimodal models have it in `text_config`."""
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION:
            if one.get(key):
                found: Mapping[str, Any] = one[key]
                return found
    return {}


def _read_weights_index(store: ReadStore, name: str, file: str) -> dict[str, str]:
    """Read the index of the weights in a folder. Return the name of the file of each tensor."""
    data = _read(store, f"{name}/{file}", safetensors.INDEX_BYTES_MAX)
    return safetensors.read_index(data, where=f"{location(store, name)}/{file}")


def _read(store: ReadStore, key: str, nbytes_max: int) -> bytes:
    return store.read(key, 0, min(store.size(key), nbytes_max + 1))


def open_torch_file(store: ReadStore, name: str, file: str) -> TorchFile:
    """Read the pickle of a `torch.save` file in a folder, but not the data of the file's
    tensors."""
    check_inside(store, name, file)
    key, where = f"{name}/{file}", f"{location(store, name)}/{file}"
    return torchfile.read_file(fetcher(store, key), store.size(key), file=file, where=where)


def _open_file(store: ReadStore, name: str, file: str) -> Manifest:
    check_inside(store, name, file)
    key = f"{name}/{file}"
    where = f"{location(store, name)}/{file}"
    return safetensors.read_file(fetcher(store, key), store.size(key), file=file, where=where)
