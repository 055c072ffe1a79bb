"""What is to be converted: any checkpoint, opened, whatever format it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.catalog.findings import Format, name_in_model, parts_of
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import Source
from holdfast.catalog.steady import fingerprint
from holdfast.errors import FormatError, NotFoundError, StorageError, UsageError
from holdfast.format.manifest import Manifest
from holdfast.hf.dialects import Dialect, dialect_of
from holdfast.storage.opening import is_url, local_path
from holdfast.tensors.lazy import Renamed, Tensors
from holdfast.tensors.quantized import Dequantized
from holdfast.tensors.stored import StoredTensors

MODEL = "model"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ASSETS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "README*")
"""Of a repository on the hub: the rest is weights in other formats."""


@dataclass(frozen=True, slots=True)
class ConvertSource:
    """A checkpoint that is open for conversion."""

    source: Source
    format: Format
    model: Tensors
    """Tensors of the model, by the names that its own state dict has; dequantized."""

    dialect: Dialect | None
    """Whose names those are; None: of a model that is not known here."""

    stored: StoredTensors
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
    if is_url(path) or Path(local_path(path)).exists():
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


def open_source(path: str) -> ConvertSource:
    """Open a step of Holdfast's, a folder of stock DCP or of Hugging Face, or a `.pt` file.

    Raises:
        NotFoundError: nothing there, or no checkpoint.
        HoldfastError: it is not whole, or not what it claims to be.
    """
    store, name = open_for_reading(fetched(path))
    seen = fingerprint(store, name)
    found = open_any(store, name, check_files=True)
    opened = _opened(found) if found.format != "safetensors" or found.file else _opened_hf(found)
    return replace(opened, seen=seen)


def _opened_hf(found: OpenCheckpoint) -> ConvertSource:
    """A Hugging Face folder: its tensors dequantized."""
    folder = found.hf
    assert folder is not None
    stored = StoredTensors(found.source, {})
    model = Dequantized(stored, folder.quantization)
    notes = folder.notes
    if model.num_quantized:
        notes = (*notes, f"{model.num_quantized} quantized tensors are dequantized")
    dialect, there = dialect_of(model.held), {name: name for name in stored.held}
    return ConvertSource(
        source=found.source,
        format="safetensors",
        model=model,
        dialect=dialect,
        stored=stored,
        originals=there,
        has_config=folder.config is not None,
        notes=notes,
        adapter=folder.adapter,
    )


def _opened(found: OpenCheckpoint) -> ConvertSource:
    """Any other checkpoint: the model's tensors told from the rest by their paths."""
    source = found.source
    names, others, parts = {}, [], parts_of(source.manifest)
    for name, entry in source.manifest.tensors.items():
        if parts[name] == MODEL:
            names[name] = name_in_model(entry.path)
        else:
            others.append(name)
    if len({*names.values()}) < len(names):
        raise FormatError(f"`{source.url}` holds a model twice, under `model` and beside it")
    stored = StoredTensors(source, found.strides)
    model = Dequantized(Renamed(stored, names), {})
    return ConvertSource(
        source=source,
        format=found.format,
        model=model,
        dialect=dialect_of(model.held),
        stored=stored,
        originals={ours: theirs for theirs, ours in names.items()},
        others=tuple(others),
        file=found.file,
    )
