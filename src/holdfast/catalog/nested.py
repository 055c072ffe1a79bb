"""Finds the checkpoint inside a folder of another program, such as a log folder of Lightning."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from holdfast.catalog.catalog import check_inside, location
from holdfast.catalog.findings import named
from holdfast.catalog.hf_folder import MODULES, modules_of
from holdfast.catalog.pieces import META_FILE, format_among
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.names import number_of
from holdfast.format.zero import UNIVERSAL_HINT
from holdfast.storage.store import ReadStore

DEPTH_MAX = 4
"""Most levels of folders to descend, as in Lightning's
`lightning_logs/version_0/checkpoints/last.ckpt`."""

_POINTER_BYTES_MAX = 1000

_MEGATRON = "latest_checkpointed_iteration.txt"
_DEEPSPEED = "latest"
_PIPELINE = "model_index.json"

_RANKS = re.compile(r"mp_rank_[0-9]+(_[0-9]+)?/", re.ASCII)
_MEGATRON_FILES = ("model_optim_rng.pt", "model_rng.pt")
_DEEPSPEED_MODEL = re.compile(r"mp_rank_([0-9]+)_model_states\.pt", re.ASCII)
_FSDP = re.compile(r"pytorch_model_fsdp_[0-9]+/", re.ASCII)
_FSDP_OF_RANK = re.compile(r"pytorch_model_fsdp_[0-9]+_rank[0-9]+\.bin", re.ASCII)
_LIGHTNING = re.compile(r".+\.ckpt/?")
_VERSION = re.compile(r"version_[0-9]+/", re.ASCII)
_TRAINER = re.compile(r"checkpoint[-_][0-9]+/", re.ASCII)


@dataclass(frozen=True, slots=True)
class Nested:
    """Checkpoints in a folder that is not a checkpoint itself."""

    kind: str
    """Kind of the folder, for messages."""

    paths: tuple[str, ...]
    """Checkpoints, or folders around them, as paths below the folder. The last is the newest."""

    why_not: str = ""
    """Reason why no checkpoint in the folder can be read; empty if they can be read."""

    hint: str | None = None
    """Hint for the error that states `why_not`."""


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder to search for checkpoints."""

    store: ReadStore
    name: str
    names: Collection[str]
    """Names of the files and folders in it."""

    def text(self, file: str) -> str:
        """Return the text of a small file, such as one that names a folder."""
        key = f"{self.name}/{file}"
        data = self.store.read(key, 0, min(self.store.size(key), _POINTER_BYTES_MAX))
        return data.decode(errors="replace").strip()

    def pointed_to(self, kind: str, pointer: str, newest: str) -> Nested:
        """Return the checkpoint `newest`, which the file `pointer` names. If this folder lacks it,
        the result has no checkpoint, and says so in `why_not`. `kind`: kind of this folder."""
        if f"{newest}/" in self.names:
            return Nested(kind, (newest,))
        return Nested(kind, (), f"`{pointer}` names `{newest[:200]}`, which is not in it")

    def has_model(self, inner: str) -> bool:
        """Return whether the folder `inner` in this one is a checkpoint."""
        return format_among(self.store.list(f"{self.name}/{inner}")) is not None


def checkpoint_in(store: ReadStore, name: str) -> str:
    """Return the path of the checkpoint in folder `name`: `name` itself if it is a checkpoint, or
    if no other program is recognised.

    Follows files in which a program names its newest checkpoint, and folders that hold a single
    checkpoint.

    Raises:
        NotFoundError: the folder has several checkpoints, or one that cannot be read. The message
            says which program wrote the folder.
    """
    for _ in range(DEPTH_MAX):
        parent, _, last = name.rpartition("/")
        if f"{last}/" not in store.list(parent):
            return name
        names = store.list(name)
        if format_among(names) is not None:
            return name
        nested = _nested_in(_Folder(store, name, names))
        if nested is None:
            return name
        if nested.why_not or len(nested.paths) > 1:
            raise _not_one(store, name, nested)
        check_inside(store, name, nested.paths[0])
        name = f"{name}/{nested.paths[0]}"
    return name


def _not_one(store: ReadStore, name: str, nested: Nested) -> NotFoundError:
    where = location(store, name)
    if nested.why_not:
        return NotFoundError(f"`{where}` is {nested.kind}: {nested.why_not}", hint=nested.hint)
    return NotFoundError(
        f"`{where}` is {nested.kind}, which holds {len(nested.paths)}: {named(nested.paths)}",
        hint=f"holdfast show {where}/{nested.paths[-1]}",
    )


def _nested_in(folder: _Folder) -> Nested | None:
    """Return the checkpoints in a folder of another program; None if no program is recognised."""
    for find in _FINDERS:
        try:
            nested = find(folder)
        except HoldfastError:
            # A finder opens small files by name. A file of that name may hold something unrelated.
            continue
        if nested is not None:
            return nested
    return None


def _megatron(folder: _Folder) -> Nested | None:
    kind = "a folder of Megatron's checkpoints"
    if _MEGATRON in folder.names:
        text = folder.text(_MEGATRON)
        newest = f"iter_{int(text):07d}" if text.isdecimal() else text
        return folder.pointed_to(kind, _MEGATRON, newest)
    ranks = sorted(entry for entry in folder.names if _RANKS.fullmatch(entry))
    if not ranks:
        return None
    files = [
        f"{rank}{file}"
        for rank in ranks
        for file in folder.store.list(f"{folder.name}/{rank[:-1]}")
        if file in _MEGATRON_FILES
    ]
    if len(files) > 1:
        return Nested(
            "a checkpoint of Megatron in its older format",
            (),
            f"it is divided over {len(files)} ranks, and its files do not say how",
            "in Megatron-LM, load it and save it with `--ckpt-format torch_dist`",
        )
    return Nested("a checkpoint of Megatron", tuple(files)) if files else None


def _deepspeed(folder: _Folder) -> Nested | None:
    if _DEEPSPEED in folder.names:
        newest = folder.text(_DEEPSPEED)
        return folder.pointed_to("a folder of DeepSpeed's checkpoints", _DEEPSPEED, newest)
    files = sorted(entry for entry in folder.names if _DEEPSPEED_MODEL.fullmatch(entry))
    if len(files) > 1:
        return Nested(
            "a checkpoint of DeepSpeed",
            (),
            f"it is divided over {len(files)} ranks of tensor parallelism, and its files do not "
            "say how",
            UNIVERSAL_HINT,
        )
    return Nested("a checkpoint of DeepSpeed", tuple(files)) if files else None


def _accelerate(folder: _Folder) -> Nested | None:
    folders = tuple(entry[:-1] for entry in sorted(folder.names) if _FSDP.fullmatch(entry))
    if folders:
        return Nested("a checkpoint of Accelerate with FSDP", folders)
    if any(map(_FSDP_OF_RANK.fullmatch, folder.names)):
        return Nested(
            "a checkpoint of Accelerate with FSDP",
            (),
            "`LOCAL_STATE_DICT` does not store how its files divide the model",
            "save it with `SHARDED_STATE_DICT`, the default of FSDP2",
        )
    folders = tuple(
        entry[:-1]
        for entry in sorted(folder.names)
        if entry.startswith("pytorch_model") and entry.endswith("/")
    )
    return Nested("a checkpoint of Accelerate", folders) if folders else None


def _lightning(folder: _Folder) -> Nested | None:
    kind = "a folder of Lightning's checkpoints"
    found = tuple(
        sorted(
            (entry.rstrip("/") for entry in folder.names if _LIGHTNING.fullmatch(entry)),
            key=lambda entry: (entry == "last.ckpt", number_of(entry) or 0, entry),
        )
    )
    if found:
        return Nested(kind, found)
    if "checkpoints/" in folder.names:
        return Nested(kind, ("checkpoints",))
    if "lightning_logs/" in folder.names:
        return Nested(kind, ("lightning_logs",))
    versions = (entry[:-1] for entry in folder.names if _VERSION.fullmatch(entry))
    numbered = sorted(versions, key=lambda entry: number_of(entry) or 0)
    return Nested(kind, tuple(numbered)) if numbered else None


def _trainer(folder: _Folder) -> Nested | None:
    folders = (entry[:-1] for entry in folder.names if _TRAINER.fullmatch(entry))
    numbered = sorted(folders, key=lambda entry: number_of(entry) or 0)
    return Nested("a folder of a trainer's checkpoints", tuple(numbered)) if numbered else None


def _meta(folder: _Folder) -> Nested | None:
    kind = "a checkpoint of Meta"
    files = sorted(entry for entry in folder.names if META_FILE.fullmatch(entry))
    if len(files) > 1:
        return Nested(
            kind,
            (),
            f"it is divided over {len(files)} ranks of tensor parallelism, and its files do not "
            "say how",
            "`convert_llama_weights_to_hf.py` of transformers joins them",
        )
    return Nested(kind, tuple(files)) if files else None


def _hub_cache(folder: _Folder) -> Nested | None:
    """Return the folder of a repository's newest revision in Hugging Face's local cache, or the
    folders of all its revisions if the newest is unknown. None for other folders."""
    if not {"snapshots/", "blobs/"} <= {*folder.names}:
        return None
    kind = "a repository in the cache of Hugging Face"
    snapshots = folder.store.list(f"{folder.name}/snapshots")
    found = tuple(f"snapshots/{entry[:-1]}" for entry in sorted(snapshots) if entry.endswith("/"))
    if len(found) > 1 and "refs/" in folder.names:
        newest = f"snapshots/{folder.text('refs/main')}"
        found = (newest,) if newest in found else found
    return Nested(kind, found) if found else None


def _modules(folder: _Folder) -> Nested | None:
    if MODULES not in folder.names:
        return None
    folders = [f for f in modules_of(folder.store, folder.name) if f and folder.has_model(f)]
    kind = "a model of sentence-transformers without weights of its own"
    return Nested(kind, tuple(reversed(folders))) if folders else None


def _pipeline(folder: _Folder) -> Nested | None:
    if _PIPELINE not in folder.names:
        return None
    folders = [entry[:-1] for entry in sorted(folder.names) if entry.endswith("/")]
    models = [inner for inner in folders if folder.has_model(inner)]
    return Nested("a pipeline of diffusers", tuple(models)) if models else None


_FINDERS: Sequence[Callable[[_Folder], Nested | None]] = (
    _megatron,
    _deepspeed,
    _meta,
    _hub_cache,
    _modules,
    _pipeline,
    _accelerate,
    _lightning,
    _trainer,
)
