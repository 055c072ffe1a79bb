"""Tensors of a checkpoint from elsewhere under the names that they have in this run."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

from holdfast.errors import UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.hf.dialects import dialect_of, renamed

KEY = "checkpoint.initial_load_renames"


def parse(rule: str) -> tuple[re.Pattern[str], str]:
    """What `theirs=ours` matches, and what to put in its place.

    Raises:
        UsageError: it is no such rule.
    """
    theirs, equals, ours = rule.partition("=")
    if not equals or not theirs or theirs.count("{}") != ours.count("{}"):
        raise UsageError(
            f"`{KEY}` has `theirs=ours`, each with as many `{{}}`, found: {rule!r}",
            hint='such as "encoder.{}.attn=layers.{}.attention", or "model=" to drop a prefix',
        )
    pattern = r"([^.]+)".join(map(re.escape, theirs.split("{}")))
    return re.compile(rf"{pattern}(?=\.|$)"), ours


class _Model(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


def as_here(manifest: Manifest, model: _Model, rules: Sequence[str]) -> Manifest:
    """The manifest of a checkpoint from elsewhere by the names that `model` gives its tensors, then
    by `rules`: see `in_words_of` and `rename`."""
    return rename(in_words_of(manifest, model.state_dict()), rules)


def in_words_of(manifest: Manifest, names: Collection[str]) -> Manifest:
    """The manifest in the words of a model that has tensors of these `names`: Meta's, or those that
    TorchTitan has from 0.3 on, optimizer state included. As it is where that is not known."""
    ours, theirs = dialect_of(names), dialect_of(manifest.tensors)
    if ours == theirs or ours in ("hf", None) or theirs in ("hf", None):
        return manifest
    assert ours in ("meta", "titan")
    keys = {str(key) for entry in manifest.tensors.values() for key in entry.path}
    called = renamed([*manifest.tensors, *keys], ours)
    return replace(
        manifest,
        tensors={
            called[name]: replace(
                entry, path=tuple(called[k] if isinstance(k, str) else k for k in entry.path)
            )
            for name, entry in manifest.tensors.items()
        },
    )


def rename(manifest: Manifest, rules: Sequence[str]) -> Manifest:
    """The manifest with every tensor under the name that the first fitting rule gives it: leading
    parts of a name are replaced, `{}` standing for any one part.

    Raises:
        UsageError: a rule that fits no tensor, or two tensors that come to have one name.
    """
    if not rules:
        return manifest
    parsed = [(rule, *parse(rule)) for rule in rules]
    used: set[str] = set()
    tensors: dict[str, TensorEntry] = {}
    for name, entry in manifest.tensors.items():
        called = name
        for rule, pattern, ours in parsed:
            match = pattern.match(name)
            if match is not None:
                used.add(rule)
                called = (ours.replace("{}", "\0") + name[match.end() :]).removeprefix(".")
                for part in match.groups():
                    called = called.replace("\0", part, 1)
                break
        if called in tensors:
            raise UsageError(f"`{KEY}` gives two tensors the name `{called}`")
        tensors[called] = entry if called == name else replace(entry, path=(called,))
    unused = [rule for rule in rules if rule not in used]
    if unused:
        near = ", ".join(list(manifest.tensors)[:3])
        raise UsageError(f"`{KEY}`: no tensor fits {unused}", hint=f"names there: {near}, ...")
    return replace(manifest, tensors=tensors)
