"""What may be replaced or deleted: one checkpoint or one export, and nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from holdfast.errors import HoldfastError, NotFoundError
from holdfast.format.names import LOCK, MANIFEST, METADATA, aside_of, step_of
from holdfast.format.safetensors import INDEX, SUFFIX
from holdfast.storage.store import ReadStore

_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp", re.ASCII)

_OURS = b'{"holdfast":'
"""First bytes of a manifest: other programs have a `manifest.json` too."""

_CONFIGS = ("config.json", "adapter_config.json", INDEX)
"""Files of which an export has at least one beside its weights."""

_ASSETS = (
    *("*.json", "*.txt", "*.model", "*.model.v[0-9]*", "*.jinja", "*.tiktoken", "*.py", "*.md"),
    *("LICENSE*", "NOTICE*", f"*{SUFFIX}"),
)
"""Files that an export may hold: weights, configurations, tokenizers, templates."""

_TEMPLATES = "additional_chat_templates/"

_LISTED_MAX = 3


def why_not_replaceable(store: ReadStore, name: str, *, file: bool = False) -> str | None:
    """Why nobody may replace what lies at `name` when told to overwrite it; None where they may.

    Everything in it must belong to one checkpoint or one export: a file of somebody's beside them
    would be lost. `file`: a file is to take its place.
    """
    if file:
        if not _is_file(store, name):
            return "it is a folder, and a file was to take its place"
        if _is_checkpoint_file(store, name):
            return None
        return _what_file(store, name) or "it is a file, and no checkpoint"
    why = why_not_removable(store, name)
    if why is not None:
        return why
    names = store.list(name)
    folders = [one for one in names if one.endswith("/") and one != _TEMPLATES]
    if folders:
        return f"it holds folders: {_listed(folders)}"
    known = _is_native if _holds_native(store, name, names) else _is_asset
    others = [one for one in names if not one.endswith("/") and not known(one)]
    return f"it holds files that are no part of a checkpoint: {_listed(others)}" if others else None


def why_not_removable(store: ReadStore, name: str) -> str | None:
    """Why retention, or a run that saves a step again, leaves what lies at `name`; None where it is
    one checkpoint, whole or damaged. What people have put into its folder goes with it, unless that
    is another checkpoint or a run."""
    if _is_file(store, name):
        return _what_file(store, name) or "it is a file"
    names = store.list(name)
    if LOCK in names:
        return f"a run saves in it: it holds `{LOCK}`"
    steps = [one for one in names if _is_step(one)]
    if steps:
        return f"it is a folder of checkpoints: {_listed(steps)}"
    nested = [one for one in names if one.endswith("/") and _is_occupied(store, f"{name}/{one}")]
    if nested:
        return f"another checkpoint, or a run, lies in it: {_listed(nested)}"
    files = [one for one in names if not one.endswith("/")]
    if not names or _holds_native(store, name, files) or _holds_export(files):
        return None
    return f"it is no checkpoint: it holds {_listed(names)}"


def _is_file(store: ReadStore, name: str) -> bool:
    above, _, last = name.rpartition("/")
    return last in store.list(above)


def _what_file(store: ReadStore, name: str) -> str | None:
    """Why a file is none that could be read; None where it is a plain one."""
    try:
        store.size(name)
    except NotFoundError:
        return "it is a link that leads nowhere"
    except HoldfastError:
        return "it is no plain file"
    return None


def _is_checkpoint_file(store: ReadStore, name: str) -> bool:
    # Not at the top: the verifier imports readers of every format, and removals are of folders.
    from holdfast.catalog.open_any import format_of

    try:
        return format_of(store, name) is not None
    except HoldfastError:
        return False


def _is_step(name: str) -> bool:
    folder = name.rstrip("/")
    return name.endswith("/") and (step_of(folder) is not None or aside_of(folder) is not None)


def _is_occupied(store: ReadStore, folder: str) -> bool:
    """Whether a folder inside a checkpoint's is a checkpoint or a run of its own. One that cannot
    be looked into might be."""
    try:
        names = store.list(folder.rstrip("/"))
    except HoldfastError:
        return True
    return bool({LOCK, MANIFEST, METADATA} & {*names}) or any(map(_is_step, names))


def _holds_native(store: ReadStore, name: str, files: Sequence[str]) -> bool:
    """Whether these are files of a step, or of a stock checkpoint. A damaged one has lost its
    manifest: then its data files tell."""
    if any(map(_DATA.fullmatch, files)) or METADATA in files:
        return True
    if MANIFEST not in files:
        return False
    try:
        return len(files) == 1 or store.read(f"{name}/{MANIFEST}", 0, len(_OURS)) == _OURS
    except HoldfastError:
        return False


def _holds_export(files: Sequence[str]) -> bool:
    return any(one.endswith(SUFFIX) for one in files) and any(one in _CONFIGS for one in files)


def _is_native(file: str) -> bool:
    return file in (MANIFEST, METADATA) or _DATA.fullmatch(file) is not None


def _is_asset(file: str) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in _ASSETS)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED_MAX} more" if len(names) > _LISTED_MAX else ""
    return ", ".join(f"`{name}`" for name in names[:_LISTED_MAX]) + more
