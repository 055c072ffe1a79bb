"""Whether a run can resume from a checkpoint.

`list`, `verify`, `doctor`, `prune`, retention and resuming all ask these functions, so that they
never contradict each other.
"""

from __future__ import annotations

from holdfast.catalog.findings import kind_of
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Manifest


def why_not_resumable(
    step: int, opened: Manifest | HoldfastError | None, damage: str | None = None
) -> str | None:
    """Reason why no run can resume from the checkpoint in the folder of `step`; None if one can.

    `opened` is its manifest, or the error that opening it raised. `damage` is the line of its mark
    `damaged`; with it, `opened` may be None.
    """
    if damage is not None:
        return damage
    assert opened is not None, "a checkpoint without a mark is opened"
    if isinstance(opened, HoldfastError):
        return opened.what
    if wrong := misnumbered(step, opened):
        return wrong
    if kind_of(opened) != "full" and step != 0:
        return "it holds the model alone, and cannot be resumed from"
    return None


def misnumbered(step: int, manifest: Manifest) -> str | None:
    """Problem of a checkpoint that was saved as another step than the number of its folder; None if
    both agree, or if the manifest has no number, as in stock DCP.

    Such a checkpoint is a copy that a user made: retention neither counts nor deletes it.
    """
    if manifest.step is None or manifest.step == step:
        return None
    return f"it holds step {manifest.step}: it is a copy of that step, or was renamed"
