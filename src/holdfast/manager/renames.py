"""Renames the tensors of a checkpoint from elsewhere to the names that this run gives them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from holdfast.errors import UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.hf.dialects import dialect_of, renamed

KEY = "checkpoint.initial_load_renames"


def parse(rule: str) -> tuple[re.Pattern[str], str]:
    """Parse a rule `theirs=ours` into a pattern and its replacement. Raises a UsageError if `rule`
    is no such rule."""
    theirs, equals, ours = rule.partition("=")
    if not equals or not theirs or theirs.count("{}") != ours.count("{}"):
        raise UsageError(
            f"`{KEY}` must have rules `theirs=ours`, with the same number of `{{}}` on both sides, "
            f"found: {rule!r}",
            hint='such as "encoder.{}.attn=layers.{}.attention", or "model=" to drop a prefix',
        )
    pattern = r"([^.]+)".join(map(re.escape, theirs.split("{}")))
    return re.compile(rf"{pattern}(?=\.|$)"), ours


def in_dialect_of(manifest: Manifest, names: Collection[str]) -> Manifest:
    """The manifest in the dialect of these tensor names, Meta's or TorchTitan's from 0.3 on.

    Renames optimizer state too. Returns the manifest unchanged if either dialect is unknown.
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
        tensors[new_names[name]] = replace(entry, path=path)
    return replace(manifest, tensors=tensors)


def rename(manifest: Manifest, rules: Sequence[str]) -> Manifest:
    """Rename every tensor by the first rule that matches the beginning of its name. `{}` matches
    one part of a name, without dots.

    Raises:
        UsageError: a rule matches no tensor, or two tensors get the same name.
    """
    if not rules:
        return manifest
    parsed = [(rule, *parse(rule)) for rule in rules]
    used: set[str] = set()
    tensors: dict[str, TensorEntry] = {}
    for name, entry in manifest.tensors.items():
        new_name = name
        for rule, pattern, ours in parsed:
            match = pattern.match(name)
            if match is not None:
                used.add(rule)
                new_name = (ours.replace("{}", "\0") + name[match.end() :]).removeprefix(".")
                for part in match.groups():
                    new_name = new_name.replace("\0", part, 1)
                break
        if new_name in tensors:
            raise UsageError(f"`{KEY}` gives two tensors the name `{new_name}`")
        tensors[new_name] = entry if new_name == name else replace(entry, path=(new_name,))
    unused = [rule for rule in rules if rule not in used]
    if unused:
        examples = ", ".join(list(manifest.tensors)[:3])
        raise UsageError(
            f"`{KEY}`: no tensor matches {unused}", hint=f"names in the checkpoint: {examples}, ..."
        )
    return replace(manifest, tensors=tensors)
