"""Finds a model below a key of a checkpoint, and refuses a checkpoint without any part of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from holdfast.catalog.findings import named
from holdfast.comm import Ranks
from holdfast.errors import MismatchError
from holdfast.format.components import MODEL_KEYS
from holdfast.format.manifest import Manifest, Path
from holdfast.format.structure import Node, children_of
from holdfast.loading.load import Loaded
from holdfast.manager.renames import in_dialect_of
from holdfast.spelling import listed
from holdfast.state.model import ModelState
from holdfast.state.stored import StoredState

NOT_OF_MODEL = (
    "is it a checkpoint of another model? `holdfast show` lists its names; "
    '`initial_load_renames = ["theirs=ours"]` changes them'
)
"""Hint for a checkpoint that has no tensor of the model."""

_LISTED_MAX = 10


@dataclass(frozen=True, slots=True)
class NestedModel:
    """A model that a checkpoint has below one key, such as `model`."""

    key: str
    manifest: Manifest
    """Manifest of the model alone, with names and paths that leave out the key."""

    ignored: tuple[str, ...]
    """Other top-level keys of the checkpoint, such as `optimizer`."""

    def __str__(self) -> str:
        ignored = f", ignoring {named(self.ignored)}" if self.ignored else ""
        return f"below its key `{self.key}`{ignored}"


def find_nested(
    manifest: Manifest, model: ModelState, ranks: Ranks, *, partial: bool
) -> NestedModel | None:
    """Return the model of a checkpoint that has all tensors of `model` below one of `MODEL_KEYS`;
    with `partial`, any of them. Return None if it has not, or if the model's own names are at its
    top.

    Collective. All ranks get the same key.
    """
    keys = [key for key in MODEL_KEYS if any(n.startswith(f"{key}.") for n in manifest.tensors)]
    if not keys:
        return None
    state = model.state_dict()
    wanted = [
        name
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in model.may_lack
    ]
    found = [in_dialect_of(_below(manifest, key), state) for key in keys]
    # A stage of a pipeline wants a part of the tensors, or none.
    at_top = any(name in manifest.tensors for name in wanted)
    has = [[*_holds(below, wanted)] for below in found]
    some, lack = map(any, has), [not all(one) for one in has]
    wants, has_top, *rest = ranks.all_reduce_max([bool(wanted), at_top, *some, *lack])
    some_on_any, lack_on_any = rest[: len(keys)], rest[len(keys) :]
    fitting = [number for number, lacks in enumerate(lack_on_any) if not lacks]
    if partial:
        fitting += [number for number, has_any in enumerate(some_on_any) if has_any]
    if not wants or has_top or not fitting:
        return None
    first = fitting[0]
    others = dict.fromkeys(name.partition(".")[0] for name in manifest.names())
    others.pop(keys[first])
    return NestedModel(keys[first], found[first], tuple(others))


def _below(manifest: Manifest, key: str) -> Manifest:
    """Return the manifest of the entries below a top-level key, without this key in names, paths
    and structure."""
    prefix = f"{key}."

    def shortened(path: Path, name: str) -> Path:
        # Some checkpoints of stock DCP have no paths: there, the whole name is the only key.
        return path[1:] if len(path) > 1 else (name.removeprefix(prefix),)

    tensors = {
        name.removeprefix(prefix): entry._replace(path=shortened(entry.path, name))
        for name, entry in manifest.tensors.items()
        if name.startswith(prefix)
    }
    values = {
        name.removeprefix(prefix): replace(entry, path=shortened(entry.path, name))
        for name, entry in manifest.values.items()
        if name.startswith(prefix)
    }
    structure: dict[Path, Node] | None = None
    if manifest.structure is not None:
        children = children_of(manifest.structure.get((key,))) or []
        structure = {(str(name),): node for name, node in children if node is not None}
        structure |= {
            path[1:]: node
            for path, node in manifest.structure.items()
            if path[0] == key and len(path) > 1
        }
    return replace(manifest, tensors=tensors, values=values, structure=structure)


def _holds(manifest: Manifest, names: Collection[str]) -> Iterator[bool]:
    """Yield for each tensor of a model whether the checkpoint has it."""
    stored = StoredState(manifest)
    return (stored.holds(name, (name,)) for name in names)


def check_matched(loaded: Loaded, ranks: Ranks, hint: str) -> None:
    """Raise a MismatchError if a partial load has matched no entry on any rank: otherwise the run
    would train from random weights. Collective."""
    if loaded.differences and not ranks.all_reduce_max([loaded.num_matched])[0]:
        raise MismatchError(
            f"`{loaded.where}` has no tensor of this model, so nothing was loaded: "
            f"{len(loaded.differences)} differences:" + listed(loaded.differences, _LISTED_MAX),
            hint=hint,
        )
