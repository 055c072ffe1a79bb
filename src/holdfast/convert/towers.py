"""Towers, the parts of a multimodal model besides its language model: kept, copied or left out.

A loader gives random values to tensors that a folder lacks. So an export has every part that its
`config.json` describes, or a note says which part is missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.catalog.hf_folder import CONFIG, of_language_model
from holdfast.convert.source import open_source
from holdfast.errors import NotFoundError
from holdfast.hf.family import Config, Family
from holdfast.tensors.lazy import Joined, Tensors, only

_PARTS = {"vision_config": ("vis", "image", "patch"), "audio_config": ("audio", "speech")}
"""Keys of parts in `config.json`, and words that occur in the names of their tensors. In every
architecture of transformers 5.24, some names of a part contain one of its words."""

_NATIVE = re.compile(r"(?:tok_embeddings|layers\.\d+|norm|output|lm_head|rope)\..*|freqs_cis")
"""Native names, and Hugging Face's name of the head, which some native dialects share."""


@dataclass(frozen=True, slots=True)
class Export:
    """Contents of an export besides the tensors of the language model."""

    towers: Tensors | None
    """Tensors of the parts besides the language model; None: there are none."""

    prefix: str
    """Prefix that is removed from the Hugging Face names of the language model."""

    config: Config
    notes: tuple[str, ...] = ()


def other_names(family: Family, names: Sequence[str], *, hf: bool) -> list[str]:
    """Return the names that do not belong to the language model of a multimodal family.

    `hf`: whether the language model has Hugging Face's names.
    """
    if not family.prefix:
        return []
    if hf:
        return [name for name in names if not name.startswith(family.prefix)]
    return [name for name in names if not _NATIVE.fullmatch(name)]


def completed(
    family: Family,
    config: Config,
    towers: Tensors | None,
    assets: str | None,
    skipped: Sequence[str],
) -> Export:
    """Return what an export of a multimodal model has besides the tensors of its language model.

    `towers`: other parts in the source. `assets`: folder to copy missing tensors of other parts
    from. `skipped`: names of tensors of other parts that the user left out.
    """
    if not family.prefix:
        return Export(None, "", config)
    copied = None if skipped or assets is None else _towers_in(assets, family)
    if towers is not None:
        lost = [f"left out {len(skipped)} tensors: loaders give them random values"]
        if copied is None:
            return Export(towers, "", config, tuple(lost if skipped else ()))
        names = [name for name in copied.infos if name not in towers.infos]
        note = f"{len(names)} tensors of other parts are copied from `{assets}`"
        whole = Joined(towers, only(copied, names)) if names else towers
        return Export(whole, "", config, (note,) if names else ())
    if copied is not None:
        note = f"{len(copied.infos)} tensors of other parts are copied from `{assets}`"
        return Export(copied, "", config, (note,))
    if family.alone is None:
        lost = ["only the language model is exported: loaders give the other parts random values"]
        return Export(None, "", config, tuple(lost))
    note = f"only the language model is exported, as {family.alone[1]}: no other part is given"
    return Export(None, family.prefix, _alone(family, config), (note,))


def absent_parts(config: Config, names: Collection[str]) -> Iterator[str]:
    """Yield a line for each part that a configuration describes although no tensor belongs to the
    part.

    Nothing is yielded for text-only classes: their configuration may describe parts that they
    ignore.
    """
    classes = config.get("architectures")
    kind = str(classes[0]) if isinstance(classes, list) and classes else ""
    if kind.endswith("ForCausalLM") or "Text" in kind:
        return
    for key, words in _PARTS.items():
        if isinstance(config.get(key), dict) and not any(w in n for n in names for w in words):
            yield f"`{CONFIG}` has `{key}`, and no tensor is of it: loaders give it random values"


def _towers_in(folder: str, family: Family) -> Tensors | None:
    """Return the tensors in a folder that belong to other parts than the language model, or None if
    the folder has none."""
    try:
        opened = open_source(folder)
    except NotFoundError:
        return None
    if opened.checkpoint.hf is None:
        return None
    names = other_names(family, [*opened.model.infos], hf=True)
    return only(opened.model, names) if names else None


def _alone(family: Family, config: Config) -> dict[str, Any]:
    """Return the configuration for an export of only the language model. `config`: configuration of
    the multimodal model."""
    assert family.alone is not None, "checked by the caller"
    text = config.get("text_config")
    model_type, architecture = family.alone
    kept = {"tie_word_embeddings", "dtype"}
    if isinstance(text, dict):
        kept |= text.keys()
    flat = {key: value for key, value in of_language_model(config).items() if key in kept}
    return {**flat, "architectures": [architecture], "model_type": model_type}
