"""Recognizes files that are not checkpoints: parts of a checkpoint, and files of other programs."""

from __future__ import annotations

import re
from collections.abc import Collection

from holdfast.catalog.catalog import location
from holdfast.catalog.findings import Format
from holdfast.catalog.hf_folder import has_safetensors, has_weights
from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.format.git_lfs import LFS, LFS_HINT
from holdfast.format.names import LOCK, MANIFEST, METADATA, ROWS
from holdfast.format.safetensors import INDEX_SUFFIX
from holdfast.format.zero import ZERO_OPTIMIZER
from holdfast.storage.store import ReadStore

_DATA = re.compile(r"__([0-9]+)_[0-9]+\.distcp", re.ASCII)
_SHARD = re.compile(r".*-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)", re.ASCII)

META_FILE = re.compile(r"consolidated\.([0-9]{2})\.pth", re.ASCII)
"""Name of one rank's file in a checkpoint of Meta."""

_BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
)

_STARTS = {
    LFS: "a pointer of Git LFS, not the weights",
    b"GGUF": "a GGUF file of llama.cpp",
    b"\x93NUMPY": "a file of numpy",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"PAR1": "a Parquet file",
    b"ustar": "a tar archive",
    b"\x7fELF": "a program",
}
"""Kind of a file, by its first bytes."""

_HEAD_BYTES = 512

_NAMED_MAX = 5
"""Most names of a folder's files in one message."""


def format_among(names: Collection[str]) -> Format | None:
    """Return the format of a folder with files of these names; None if it is not a checkpoint."""
    if MANIFEST in names:
        return "holdfast"
    if METADATA in names:
        return "dcp"
    if has_safetensors(names):
        return "safetensors"
    if any(map(ZERO_OPTIMIZER.fullmatch, names)):
        return "zero"
    return "bin" if has_weights(names) else None


def check_whole_checkpoint(store: ReadStore, name: str) -> None:
    """Raise a UsageError if a file is a part of a checkpoint. The message names the checkpoint."""
    folder, _, last = name.rpartition("/")
    in_checkpoint = format_among(store.list(folder)) is not None
    part = _part(last, in_checkpoint=in_checkpoint)
    if part is None:
        return
    checkpoint, where = "a checkpoint", _folder(store, folder)
    hint = f"the checkpoint is the whole folder, with `{MANIFEST}` or `{METADATA}` in it"
    if in_checkpoint:
        checkpoint, hint = f"`{where}`", f"holdfast verify {where}"
    raise UsageError(
        f"`{location(store, name)}` is {part} of {checkpoint}, and no checkpoint by itself",
        hint=hint,
    )


def note_on(store: ReadStore, name: str) -> str | None:
    """Return a note on a file that holds one shard of a model; None for other files."""
    folder, _, last = name.rpartition("/")
    if META_FILE.fullmatch(last):
        count = sum(META_FILE.fullmatch(file) is not None for file in store.list(folder))
        whole = f"it is one of {count} files, each of which has a part of most tensors"
        return whole if count > 1 else None
    shard = _SHARD.fullmatch(last)
    if shard is None:
        return None
    number, count = int(shard[1]), int(shard[2])
    return f"it is file {number} of {count}: `holdfast verify {_folder(store, folder)}` checks all"


def no_checkpoint(store: ReadStore, name: str, *, hint: str) -> NotFoundError:
    """Return the error for a file or folder that is not a checkpoint."""
    where = location(store, name)
    try:
        above, _, last = name.rpartition("/")
        is_file = last in store.list(above)
        start = store.read(name, 0, _HEAD_BYTES) if is_file else b""
        kind = _kind(start) if is_file else None
        found = [] if is_file else store.list(name)
    except HoldfastError:
        kind, found, start = None, [], b""
    if kind is not None:
        return NotFoundError(
            f"`{where}` is no checkpoint: it is {kind}",
            hint=LFS_HINT
            if start.startswith(LFS)
            else "Holdfast reads its own and stock DCP's checkpoints, Hugging Face folders, "
            "safetensors and files of torch.save",
        )
    names = f"; found: {', '.join(found[:_NAMED_MAX])}" if found else ""
    names += ", ..." if len(found) > _NAMED_MAX else ""
    return NotFoundError(
        f"`{where}` is no checkpoint: no `{MANIFEST}`, no `{METADATA}`, no safetensors{names}",
        hint=hint,
    )


def _folder(store: ReadStore, folder: str) -> str:
    return location(store, folder).rstrip("/")


def _part(last: str, *, in_checkpoint: bool) -> str | None:
    """Return the role that a file named `last` has in a checkpoint, for messages; None if it has
    none. `in_checkpoint`: whether the file is in the folder of a checkpoint."""
    data = _DATA.fullmatch(last)
    if data is not None:
        return f"the data that rank {data[1]} wrote"
    named = {
        MANIFEST: "the index",
        METADATA: "the index for stock torch",
        LOCK: "the lock",
    }
    if last in named:
        return named[last]
    if last.endswith((INDEX_SUFFIX, ".bin.index.json")):
        return "the index of the weights"
    if in_checkpoint and last == ROWS:
        return "the list of chunks"
    return "a file beside the weights" if in_checkpoint and last in _BESIDE_WEIGHTS else None


def _kind(start: bytes) -> str | None:
    """Return the kind of a file that begins with the bytes `start`, for messages; None if it is
    unknown."""
    for magic, kind in _STARTS.items():
        if start.startswith(magic) or (magic == b"ustar" and start[257:262] == magic):
            return kind
    if not start:
        return "an empty file"
    # `start` may end inside a character, which decodes to U+FFFD.
    text = start.decode(errors="replace").rstrip("\ufffd")
    return None if {"\0", "\ufffd"} & {*text} else "a text file"
