"""Renames the tensors of a checkpoint from another program to the names in this run's model."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

from holdfast.errors import UsageError
from holdfast.format.manifest import Manifest
from holdfast.hf.dialects import dialect_of, renamed
from holdfast.tensors.renames import new_names, suggested

KEY = "checkpoint.initial_load_renames"


def rename_hint(stored: Collection[str], expected: Collection[str]) -> str | None:
    """Return a hint with rules that give the tensors `stored` the names `expected`; None if no such
    rules are known."""
    rules = suggested(stored, expected)
    try:
        found = {*new_names(stored, rules, KEY).values()} & {*expected}
    except UsageError:
        return None  # Two tensors would get the same name.
    if len(found) <= len({*stored} & {*expected}):
        return None
    setting = f"`initial_load_renames = {json.dumps(rules)}`"
    return f"the tensors have other names there: {setting} changes them"


def in_dialect_of(manifest: Manifest, names: Collection[str]) -> Manifest:
    """Return the manifest with its tensors renamed to the dialect that `names` are in.

    Renames optimizer state too. Converts only between Meta's dialect and that of TorchTitan from
    0.3 on; for all other dialects, returns the manifest unchanged.
    """
    ours, theirs = dialect_of(names), dialect_of(manifest.tensors)
    if ours == theirs or ours in ("hf", None) or theirs in ("hf", None):
        return manifest
    assert ours in ("meta", "titan")
    keys = {str(key) for entry in manifest.tensors.values() for key in entry.path}
    new_names = renamed([*manifest.tensors, *keys], ours)
    tensors = {}
    for name, entry in manifest.tensors.items():
        path = tuple(new_names[key] if isinstance(key, str) else key for key in entry.path)
        tensors[new_names[name]] = entry._replace(path=path)
    return replace(manifest, tensors=tensors)


def rename(manifest: Manifest, rules: Sequence[str]) -> Manifest:
    """Return the manifest with each tensor renamed by the first rule that matches the beginning of
    its name. A rule is `theirs=ours`; `{}` in it matches one part of a name, without dots.

    Raises:
        UsageError: a rule matches no tensor, or two tensors get the same name.
    """
    if not rules:
        return manifest
    tensors = {}
    for name, new_name in new_names(manifest.tensors, rules, KEY).items():
        entry = manifest.tensors[name]
        tensors[new_name] = entry if new_name == name else entry._replace(path=(new_name,))
    return replace(manifest, tensors=tensors)
