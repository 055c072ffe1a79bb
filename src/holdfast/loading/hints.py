"""Hints for calls of `holdfast.load` whose state does not fit the checkpoint."""

from __future__ import annotations

from collections.abc import Collection

from holdfast.catalog.findings import components_of
from holdfast.format.components import MODEL, MODEL_KEYS
from holdfast.format.manifest import Manifest

HINT = (
    "is it a checkpoint of another model? `holdfast show` lists its entries. To load only the "
    "rest, leave the entries that differ out of the state"
)
"""Hint where the call itself may be right."""


def hint_of_call(manifest: Manifest, missing: Collection[str], extra: Collection[str]) -> str:
    """Return the hint for a call of `holdfast.load`. If the checkpoint has the model under other
    names than the state, or has other components beside it, the hint says how to load the model.

    `missing`: names of the state's entries that do not fit. `extra`: names of the entries that only
    the checkpoint has.
    """
    names = {*manifest.tensors, *manifest.values}
    component_of = components_of(manifest)
    others = [name for name in dict.fromkeys(component_of.values()) if name != MODEL]
    option = ", strict=False" if others else ""
    if not missing:
        if extra and all(component_of[name] != MODEL for name in extra):
            also = ", ".join(f"`{name}`" for name in others)
            return (
                f"the checkpoint also has {also}: to load the model alone, "
                f"`holdfast.load(path, model{option})`"
            )
        return HINT
    tops = dict.fromkeys(name.partition(".")[0] for name in names)
    keys = [key for key in tops if all(f"{key}.{name}" in names for name in missing)]
    # If several keys fit, they may be layers of another model, such as `0` and `1`.
    keys = [key for key in keys if key in MODEL_KEYS] or keys
    if len(keys) == 1:
        return (
            f"the checkpoint has these entries below `{keys[0]}`: "
            f'`holdfast.load(path, {{"{keys[0]}": model}})`'
        )
    first, *more = dict.fromkeys(name.partition(".")[0] for name in missing)
    if not more and all(name.removeprefix(f"{first}.") in names for name in missing):
        return (
            f"the checkpoint has these entries without `{first}.`: load this module by itself, "
            f"`holdfast.load(path, model{option})`"
        )
    return HINT
