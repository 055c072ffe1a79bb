"""Source of a conversion: a checkpoint of any format, or a repository on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as LocalPath

from holdfast.catalog.catalog import location
from holdfast.catalog.findings import components_of, name_in_model
from holdfast.catalog.nested import checkpoint_in
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.pieces import note_on
from holdfast.catalog.steady import fingerprint
from holdfast.errors import FormatError, NotFoundError, StorageError, UsageError
from holdfast.format.components import MODEL
from holdfast.format.manifest import Path
from holdfast.hf.dialects import Dialect, dialect_of
from holdfast.storage.opening import is_url, local_path
from holdfast.tensors.lazy import Renamed, Tensors
from holdfast.tensors.quantized import Dequantized
from holdfast.tensors.renames import new_names, spelled, suggested
from holdfast.tensors.stored import StoredTensors

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Name of a repository on the hub."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ASSETS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "README*")
"""Files to download from the hub besides `WEIGHTS`. All others are weights in other formats."""


@dataclass(frozen=True, slots=True)
class ConvertSource:
    """A checkpoint, open for conversion."""

    given: str
    """Path, URL or name on the hub, as it was given."""

    checkpoint: OpenCheckpoint
    model: Tensors
    """Tensors of the model, dequantized, by their names in the model's own state dict."""

    dialect: Dialect | None
    """Dialect of the names in `model`; None: unknown."""

    stored: StoredTensors
    """All tensors as stored, by their names in the manifest."""

    originals: Mapping[str, str]
    """Name in the manifest of each tensor of the model, by its name in `model`."""

    others: tuple[str, ...]
    """Manifest names of the tensors that do not belong to the model."""

    notes: tuple[str, ...]
    fingerprint: object
    """Fingerprint of the checkpoint when it was opened."""

    @property
    def where(self) -> str:
        """Path or URL of the checkpoint, or of the folder around a single file."""
        return self.checkpoint.source.url

    def path_of(self, name: str) -> Path:
        """Return the path of a model tensor in the target: the path in the source, unless
        renamed."""
        original = self.originals.get(name)
        if original is None:
            return (name,)
        path = self.checkpoint.manifest.tensors[original].path
        own_name = name_in_model(path)
        if name == own_name:
            return path
        # If the source nests the model below a key such as `model`, keep that key.
        above = path[:1] if own_name != ".".join(map(str, path)) else ()
        return (*above, name)

    @property
    def has_config(self) -> bool:
        """Whether there is a `config.json` beside the weights."""
        return self.checkpoint.hf is not None and self.checkpoint.hf.config is not None

    @property
    def is_gone(self) -> bool:
        """Whether the checkpoint has been replaced or deleted since it was opened."""
        source, file = self.checkpoint.source, self.checkpoint.file
        key = f"{source.folder}/{file}" if file else source.folder
        return fingerprint(source.store, key) != self.fingerprint


def hub_name(path: str) -> str | None:
    """Return `path` if it names a repository on the hub, and does not exist locally; else None."""
    if is_url(path) or LocalPath(local_path(path)).exists():
        return None
    return path if HUB_NAME.fullmatch(path) else None


def check_is_no_file(path: str, option: str) -> None:
    """Raise a UsageError if `path`, the value of `option`, is a file. The file's folder is
    expected."""
    if not is_url(path) and LocalPath(local_path(path)).is_file():
        raise UsageError(
            f"`{option} {path}` must be a folder, found: a file",
            hint=f"`{option} {LocalPath(local_path(path)).parent}`",
        )


def fetched(path: str, *, assets_only: bool = False) -> str:
    """Return `path` if it exists or is a URL, else the local copy of the hub repository `path`.

    Files that the copy lacks are downloaded. `assets_only`: whether to leave out the weights.
    """
    if is_url(path) or LocalPath(local_path(path)).exists():
        return path
    if hub_name(path) is None:
        raise NotFoundError(
            f"nothing at `{path}`",
            hint="give a path, or the `org/name` of a repository on the Hugging Face hub",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"nothing at `{path}`, and a download from the hub needs `huggingface_hub`",
            hint="pip install 'holdfast[hf]'",
        ) from error
    patterns = [*ASSETS, *(() if assets_only else WEIGHTS)]
    ignored = ["*.safetensors"] if assets_only else []
    try:
        return str(snapshot_download(path, allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(
            f"nothing at `{path}`, and it cannot be downloaded from the hub: {reason[0]}",
            hint="check the name; set HF_TOKEN for gated models, HF_HUB_OFFLINE=1 for cached ones",
        ) from error


def open_source(path: str, renames: Sequence[str] = ()) -> ConvertSource:
    """Open a checkpoint of any format, for conversion. `renames`: rules `theirs=ours` for the names
    of the model's tensors."""
    store, opened_name = open_for_reading(fetched(path))
    name = checkpoint_in(store, opened_name)
    found = () if name == opened_name else (f"the checkpoint in it is `{location(store, name)}`",)
    opened_as = fingerprint(store, name)
    checkpoint = open_any(store, name, check_files=True)
    names, others = _names_in_model(checkpoint)
    stored_names = [*names.values()]
    # Names of PEFT begin with `base_model.`, as if a wrapper had added it: do not suggest to drop
    # it.
    is_adapter = any(".lora_A." in name for name in stored_names) or (
        checkpoint.hf is not None and checkpoint.hf.adapter is not None
    )
    if renames:
        key = None if checkpoint.hf is not None else _key_above(checkpoint, names)
        renamed_to = new_names(stored_names, renames, "--rename", key=key)
        names = {original: renamed_to[name] for original, name in names.items()}
    elif not is_adapter and (rules := suggested(stored_names)):
        found = (*found, f"names have parts that a wrapper added: `{spelled(rules)}` drops them")
    if checkpoint.file and (note := note_on(store, name)) is not None:
        found = (*found, note)
    stored = StoredTensors(checkpoint.source, checkpoint.strides)
    quantization = {} if checkpoint.hf is None else checkpoint.hf.quantization
    is_published = checkpoint.hf is not None
    model = Dequantized(Renamed(stored, names), quantization, keeps_fp8=not is_published)
    of_model = () if checkpoint.hf is None else model.notes
    return ConvertSource(
        given=path,
        checkpoint=checkpoint,
        model=model,
        dialect=dialect_of(model.infos),
        stored=stored,
        originals={new: old for old, new in names.items()},
        others=others,
        notes=(*found, *checkpoint.notes, *of_model),
        fingerprint=opened_as,
    )


def _key_above(checkpoint: OpenCheckpoint, names: Mapping[str, str]) -> str | None:
    """Return the key that the checkpoint has its model below, such as `model`; None if the model is
    at the top. `names`: see `_names_in_model`."""
    paths = {name: checkpoint.manifest.tensors[name].path for name in names}
    keys = {str(path[0]) for name, path in paths.items() if names[name] != ".".join(map(str, path))}
    return next(iter(keys), None)


def _names_in_model(checkpoint: OpenCheckpoint) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the names of the model's tensors in the model's own state dict, by their names in the
    manifest; and the manifest names of all other tensors.

    In a Hugging Face folder, all tensors belong to the model.
    """
    tensors = checkpoint.manifest.tensors
    if checkpoint.hf is not None:
        return {name: name for name in tensors}, ()
    components = components_of(checkpoint.manifest)
    names = {n: name_in_model(e.path) for n, e in tensors.items() if components[n] == MODEL}
    if len({*names.values()}) < len(names):
        raise FormatError(
            f"`{checkpoint.source.url}` has two models, one under `model` and one beside it"
        )
    return names, tuple(name for name in tensors if name not in names)
