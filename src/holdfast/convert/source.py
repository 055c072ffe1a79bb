"""What is to be converted: any checkpoint, opened, whatever format it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.findings import Format, name_in_model, parts_of
from holdfast.catalog.pieces import no_checkpoint
from holdfast.catalog.steady import fingerprint
from holdfast.catalog.verify import format_of
from holdfast.engine.root import open_for_reading
from holdfast.engine.source import Source
from holdfast.errors import FormatError, NotFoundError, StorageError, UsageError
from holdfast.format import safetensors, torchfile
from holdfast.format.manifest import Manifest
from holdfast.hf.dialects import Dialect, dialect_of
from holdfast.hf.folder import open_folder
from holdfast.hf.quantized import Dequantized
from holdfast.hf.stored import Stored
from holdfast.hf.tensors import Renamed, Tensors
from holdfast.storage.opening import is_url
from holdfast.storage.store import ReadStore

MODEL = "model"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ASSETS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "README*")
"""Of a repository on the hub: the rest is weights in other formats."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint that is open for conversion."""

    source: Source
    format: Format
    model: Tensors
    """Tensors of the model, by the names that its own state dict has; dequantized."""

    dialect: Dialect | None
    """Whose names those are; None: of a model that is not known here."""

    stored: Stored
    """All tensors as they lie there, by their names in the manifest."""

    originals: Mapping[str, str]
    """Names in the manifest of those of the model's tensors that are there as they are."""

    others: tuple[str, ...] = ()
    """Tensors that are not the model's, by their names in the manifest."""

    has_config: bool = False
    """Whether there is a `config.json` beside the weights."""

    notes: tuple[str, ...] = ()

    adapter: Mapping[str, Any] | None = None
    """What PEFT says of it, where it is an adapter and no model."""

    file: str = ""
    """Within the source's folder, where the checkpoint is one file."""

    seen: object = None
    """Fingerprint of the checkpoint when it was opened."""

    @property
    def where(self) -> str:
        return self.source.url

    @property
    def path(self) -> str:
        """Path or URL of the folder or file that is read."""
        return f"{self.where}/{self.file}" if self.file else self.where

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    @property
    def is_gone(self) -> bool:
        """Whether the checkpoint has been replaced or removed since."""
        key = f"{self.source.folder}/{self.file}" if self.file else self.source.folder
        return fingerprint(self.source.store, key) != self.seen


def fetched(path: str, *, assets_only: bool = False) -> str:
    """A path to what is asked for: `path` itself where that exists or is a URL, otherwise the copy
    of the repository `org/name` of the Hugging Face hub, downloaded if need be.

    Raises:
        NotFoundError: neither.
        StorageError: the hub cannot be reached.
    """
    if is_url(path) or Path(path).exists():
        return path
    if not _HUB_NAME.fullmatch(path):
        raise NotFoundError(
            f"nothing at `{path}`", hint="a path, or `org/name` of a repository on the hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"`{path}` is no path here, and for the hub `huggingface_hub` is needed",
            hint="pip install 'holdfast[hf]'",
        ) from error
    wanted = [*ASSETS, *(() if assets_only else WEIGHTS)]
    ignored = ["*.safetensors"] if assets_only else []
    try:
        return str(snapshot_download(path, allow_patterns=wanted, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            f"`{path}` is no path here, and could not be had from the hub: {reason[0]}",
            hint="check the name; HF_TOKEN for gated models, HF_HUB_OFFLINE=1 for what is cached",
        ) from error


def open_source(path: str) -> Opened:
    """Open a step of Holdfast's, a folder of stock DCP or of Hugging Face, or a `.pt` file.

    Raises:
        NotFoundError: nothing there, or no checkpoint.
        HoldfastError: it is not whole, or not what it claims to be.
    """
    found = fetched(path)
    store, name = open_for_reading(found)
    seen = fingerprint(store, name)
    return replace(_open(found, store, name), seen=seen)


def _open(found: str, store: ReadStore, name: str) -> Opened:
    form = format_of(store, name)
    if form is None:
        raise no_checkpoint(
            store, name, hint="a step of a run, a Hugging Face folder, or a .pt file"
        )
    is_file = Path(found).is_file()
    if form == "safetensors":
        return _open_safetensors(found) if is_file else _open_hub_folder(found)
    if form == "torch":
        return _open_torch_file(found)
    source = Source(store, name, open_manifest(store, name))
    return _opened(source, form, Stored(source, {}))


def _open_hub_folder(path: str) -> Opened:
    store, name = open_for_reading(path)
    folder = open_folder(store, name)
    source = Source(store, name, folder.manifest)
    stored = Stored(source, {})
    model = Dequantized(stored, folder.quantization)
    notes = folder.notes
    if model.num_quantized:
        notes = (*notes, f"{model.num_quantized} quantized tensors are dequantized")
    dialect, there = dialect_of(model.held), {name: name for name in stored.held}
    return Opened(
        *(source, "safetensors", model, dialect, stored, there),
        has_config=folder.config is not None,
        notes=notes,
        adapter=folder.adapter,
    )


def _open_safetensors(path: str) -> Opened:
    store, name, file = _split(path)
    size = store.size(f"{name}/{file}")
    fetch = partial(_fetch, Source(store, name, Manifest({}, {})), file)
    manifest = safetensors.read_file(fetch, size, file=file, where=path)
    source = Source(store, name, manifest)
    return replace(_opened(source, "safetensors", Stored(source, {})), file=file)


def _open_torch_file(path: str) -> Opened:
    store, name, file = _split(path)
    size = store.size(f"{name}/{file}")
    fetch = partial(_fetch, Source(store, name, Manifest({}, {})), file)
    found = torchfile.read_file(fetch, size, file=file, where=path)
    source = Source(store, name, found.manifest)
    return replace(_opened(source, "torch", Stored(source, found.strides)), file=file)


def _opened(source: Source, form: Format, stored: Stored) -> Opened:
    """A native checkpoint: the model's tensors told from the rest by their paths."""
    names, others, parts = {}, [], parts_of(source.manifest)
    for name, entry in source.manifest.tensors.items():
        if parts[name] == MODEL:
            names[name] = name_in_model(entry.path)
        else:
            others.append(name)
    if len({*names.values()}) < len(names):
        raise FormatError(f"`{source.url}` holds a model twice, under `model` and beside it")
    model = Dequantized(Renamed(stored, names), {})
    originals = {ours: theirs for theirs, ours in names.items()}
    dialect = dialect_of(model.held)
    return Opened(source, form, model, dialect, stored, originals, tuple(others))


def _split(path: str) -> tuple[Any, str, str]:
    """The store of a file, its folder there, and its name."""
    full = Path(path).absolute()
    store, name = open_for_reading(full.parent)
    return store, name, full.name


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
