"""What a file is that is no checkpoint by itself: a piece of one, or another program's."""

from __future__ import annotations

import re

from holdfast.catalog.catalog import place
from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.format.names import LOCK, MANIFEST, METADATA
from holdfast.format.safetensors import SUFFIX
from holdfast.storage.store import ReadStore

INDEX = f"{SUFFIX}.index.json"

_DATA = re.compile(r"__([0-9]+)_[0-9]+\.distcp", re.ASCII)
_SHARD = re.compile(r".*-([0-9]{5})-of-([0-9]{5})\.safetensors", re.ASCII)

_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "adapter_config.json",
)

_STARTS = {
    b"GGUF": "a GGUF file of llama.cpp",
    b"\x93NUMPY": "a file of numpy",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"PAR1": "a Parquet file",
    b"ustar": "a tar archive",
    b"\x7fELF": "a program",
}
"""First bytes of files that people have beside checkpoints."""

_HEAD_BYTES = 512


def check_whole_checkpoint(store: ReadStore, name: str) -> None:
    """Refuse a file that is a piece of a checkpoint.

    Raises:
        UsageError: says which piece, and of which checkpoint.
    """
    folder, _, last = name.rpartition("/")
    within = _is_checkpoint(store, folder)
    piece = _piece(last, within=within)
    if piece is None:
        return
    where = _folder(store, folder)
    hint = f"holdfast verify {where}"
    if not within:
        hint = f"the checkpoint is the whole folder, with `{MANIFEST}` or `{METADATA}` in it"
    raise UsageError(
        f"`{place(store, name)}` is {piece} of {f'`{where}`' if within else 'a checkpoint'}, "
        "and no checkpoint by itself",
        hint=hint,
    )


def note_on(store: ReadStore, name: str) -> str | None:
    """What a person should know of a file that can be read by itself, and belongs to others."""
    folder, _, last = name.rpartition("/")
    shard = _SHARD.fullmatch(last)
    if shard is None:
        return None
    number, count = map(int, shard.groups())
    return f"it is file {number} of {count}: `holdfast verify {_folder(store, folder)}` checks all"


def no_checkpoint(store: ReadStore, name: str, *, hint: str) -> NotFoundError:
    """What is said of a place where something is, but no checkpoint."""
    where = place(store, name)
    try:
        above, _, last = name.rpartition("/")
        is_file = last in store.list(above)
        kind = _kind(store.read(name, 0, _HEAD_BYTES)) if is_file else None
    except HoldfastError:
        kind = None
    if kind is not None:
        return NotFoundError(
            f"`{where}` is no checkpoint: it is {kind}",
            hint="it reads steps, folders of Hugging Face, safetensors and files of torch.save",
        )
    return NotFoundError(
        f"`{where}` is no checkpoint: no `{MANIFEST}`, no `{METADATA}`, no safetensors", hint=hint
    )


def _folder(store: ReadStore, folder: str) -> str:
    return place(store, folder).rstrip("/")


def _piece(last: str, *, within: bool) -> str | None:
    """What a file of this name is, in the folder of a checkpoint or elsewhere."""
    data = _DATA.fullmatch(last)
    if data is not None:
        return f"the data that rank {data[1]} wrote"
    named = {MANIFEST: "the index", METADATA: "the index for stock torch", LOCK: "the lock"}
    if last in named:
        return named[last]
    if last.endswith(INDEX):
        return "the index of the weights"
    return "a file beside the weights" if within and last in _BESIDE else None


def _is_checkpoint(store: ReadStore, folder: str) -> bool:
    there = store.list(folder)
    return any(one in (MANIFEST, METADATA) or one.endswith((SUFFIX, INDEX)) for one in there)


def _kind(start: bytes) -> str | None:
    """What a file that begins so is; None where nothing tells."""
    for first, kind in _STARTS.items():
        if start.startswith(first) or (first == b"ustar" and start[257:262] == first):
            return kind
    if not start:
        return "an empty file"
    # A character may be cut in two at the end.
    text = start.decode(errors="replace").rstrip("\ufffd")
    return None if {"\0", "\ufffd"} & {*text} else "a text file"
