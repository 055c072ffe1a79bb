"""Decides which folders may be replaced or deleted: those that are one checkpoint or one export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from holdfast.catalog.findings import named
from holdfast.errors import HoldfastError, NotFoundError, StorageError
from holdfast.format.names import LOCK, MANIFEST, METADATA, ROWS, hidden_folder_of, step_of
from holdfast.format.safetensors import INDEX, SUFFIX
from holdfast.format.seal import SEAL, decode
from holdfast.storage.store import ReadStore, Refusing

_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp", re.ASCII)

_SINGLE = (MANIFEST, ROWS, METADATA, f"{METADATA}.tmp", "meta.pt")
_NATIVE = re.compile("|".join([_DATA.pattern, *map(re.escape, _SINGLE)]), re.ASCII)
"""Names of all files of Holdfast's and stock DCP's checkpoints. A stock save that was killed leaves
`.metadata.tmp`. Lightning adds `meta.pt`."""

_OURS = b'{"holdfast":'
"""First bytes of Holdfast's manifest. Other programs write a `manifest.json` too."""

_CONFIGS = ("config.json", "adapter_config.json", INDEX)
"""Files of which an export has at least one beside its weights."""

_EXPORTED = re.compile(
    rf".*({re.escape(SUFFIX)}|\.(jinja|json|md|model|model\.v[0-9].*|py|tiktoken|txt))"
    "|(LICENSE|NOTICE).*",
    re.DOTALL,
)
"""Names of all files of an export: weights, configurations, tokenizers, templates."""

_EXPORTED_FOLDERS = ("additional_chat_templates/", "sharded/")
"""Folders in an export. TorchTitan writes weights to `sharded/`, and consolidates them later."""

_TOOLS = re.compile(
    r"(.*/)?(\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+|\.DS_Store|\._.*|Thumbs\.db|desktop\.ini)",
    re.DOTALL,
)
"""Names of files that file systems and file managers leave, which nobody misses."""


def why_not_replaceable(store: ReadStore, name: str) -> str | None:
    """Return the reason why a folder may not replace the folder or file `name`; None if it may.

    None also means that retention and `holdfast prune` may delete `name`, and that a run may save
    this step again. All files in `name` must belong to one checkpoint or one export. Otherwise
    files of the user would be lost.

    Raises:
        StorageError: the seal of the folder cannot be read now.
    """
    if why := why_not_removable(store, name):
        return why
    names = store.list(name)
    if SEAL in names:
        others = [path for path in not_sealed(store, name) if not _TOOLS.fullmatch(path)]
        return f"it holds files that its seal does not list: {named(others)}" if others else None
    is_native = _holds_native(store, name, names)
    known, known_folders = (_NATIVE, ()) if is_native else (_EXPORTED, _EXPORTED_FOLDERS)
    folders = [entry for entry in names if entry.endswith("/")]
    if others := [folder for folder in folders if folder not in known_folders]:
        return f"it holds folders: {named(others)}"
    files = [entry for entry in names if not entry.endswith("/")]
    for folder in folders:
        files += [f"{folder}{entry}" for entry in store.list(f"{name}/{folder}".rstrip("/"))]
    others = [file for file in files if not known.fullmatch(file) and not _TOOLS.fullmatch(file)]
    return f"it holds files that are no part of a checkpoint: {named(others)}" if others else None


def why_not_removable(store: ReadStore, name: str) -> str | None:
    """Return the reason why the framework that wrote `name` may not delete it; None if `name` is
    one checkpoint or one export, good or damaged.

    A folder that contains another checkpoint or a run may not be deleted. Other files in it are
    deleted with it: callbacks of frameworks add files to a checkpoint, and a framework deletes the
    whole folder.
    """
    if is_file(store, name):
        return special_file(store, name) or "it is a file"
    if isinstance(store, Refusing) and (why := store.why_fixed(name)):
        return why
    names = store.list(name)
    if LOCK in names:
        return f"a run saves in it: it holds `{LOCK}`"
    steps = [entry for entry in names if _is_step(entry)]
    if steps:
        return f"it is a folder of checkpoints: {named(steps)}"
    if SEAL in names:
        folders = [entry for entry in not_sealed(store, name) if entry.endswith("/")]
    else:
        folders = [entry for entry in names if entry.endswith("/")]
    nested = [f for f in folders if _is_occupied(store, f"{name}/{f}")]
    if nested:
        return f"another checkpoint, or a run, is in it: {named(nested)}"
    files = [entry for entry in names if not entry.endswith("/")]
    if not names or SEAL in names or _holds_native(store, name, files):
        return None
    if any(file.endswith(SUFFIX) for file in files) and {*_CONFIGS} & {*files}:
        return None
    return f"it is no checkpoint: it holds {named(names)}"


def is_checkpoint_with_others(store: ReadStore, name: str) -> bool:
    """Return whether a folder holds a checkpoint of Holdfast or stock DCP, beside any other files,
    and neither another checkpoint nor a run."""
    return why_not_removable(store, name) is None and _holds_native(store, name, store.list(name))


def not_sealed(store: ReadStore, name: str) -> Iterator[str]:
    """Yield the files of a sealed folder that its seal does not list, and the folders that contain
    no listed file.

    Yields nothing if the seal is damaged: the folder then counts as a damaged checkpoint. Raises a
    StorageError if the seal cannot be read now.
    """
    try:
        key = f"{name}/{SEAL}"
        sealed = {*decode(store.read(key, 0, store.size(key)), where=key).files, SEAL}
    except StorageError:
        raise
    except HoldfastError:
        return
    folders = {"/".join(file.split("/")[:n]) for file in sealed for n in range(file.count("/") + 1)}
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        for entry in store.list(f"{name}/{parent}".rstrip("/")):
            path = f"{parent}{entry}"
            if entry.endswith("/") and path.rstrip("/") in folders:
                waiting.append(path)
            elif path not in sealed:
                yield path


def is_file(store: ReadStore, name: str) -> bool:
    """Return whether `name` is a file, or anything else but a folder."""
    parent, _, last = name.rpartition("/")
    return last in store.list(parent)


def special_file(store: ReadStore, name: str) -> str | None:
    """Return why a file cannot be read: it is a broken link, a device, ...; None for a plain
    file."""
    try:
        store.size(name)
    except NotFoundError:
        return "it is a link that leads nowhere"
    except HoldfastError:
        return "it is no plain file"
    return None


def _is_step(name: str) -> bool:
    if not name.endswith("/"):
        return False
    return step_of(name[:-1]) is not None or hidden_folder_of(name[:-1]) is not None


def _is_occupied(store: ReadStore, folder: str) -> bool:
    """Return whether a folder inside a checkpoint's folder is itself a checkpoint or the folder of
    a run. True if it cannot be listed."""
    try:
        names = store.list(folder.rstrip("/"))
    except HoldfastError:
        return True
    return bool({LOCK, MANIFEST, METADATA} & {*names}) or any(map(_is_step, names))


def _holds_native(store: ReadStore, name: str, files: Sequence[str]) -> bool:
    """Return whether folder `name`, which has these files, holds a checkpoint of Holdfast or stock
    DCP. Data files are enough, since a damaged checkpoint may lack its manifest."""
    if any(map(_DATA.fullmatch, files)) or METADATA in files:
        return True
    if MANIFEST not in files:
        return False
    try:
        return len(files) == 1 or store.read(f"{name}/{MANIFEST}", 0, len(_OURS)) == _OURS
    except HoldfastError:
        return False
