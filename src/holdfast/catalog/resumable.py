"""Which checkpoint of a folder a run can go on from: decided here, and nowhere else.

`list`, `verify`, `doctor`, `prune`, retention and the resume itself ask these functions, so that
none of them says what another one does not do.
"""

from __future__ import annotations

from holdfast.catalog.findings import kind_of
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Manifest


def why_not_resumable(
    step: int, found: Manifest | HoldfastError | None, damage: str | None = None
) -> str | None:
    """Why no run can go on from the checkpoint in the folder of `step`; None where one can.

    `found` is what it holds, or the error in which opening it has ended; `damage` is what the mark
    beside it says, and reason enough: then `found` may be None.
    """
    if damage is not None:
        return damage
    assert found is not None, "without a mark it is looked into"
    if isinstance(found, HoldfastError):
        return found.what
    wrong = misnumbered(step, found)
    if wrong is not None:
        return wrong
    if kind_of(found) != "full" and step != 0:
        return "it holds the model alone, and cannot be resumed from"
    return None


def misnumbered(step: int, manifest: Manifest) -> str | None:
    """What is wrong with a checkpoint whose folder has another number than it was saved under; None
    where they agree, or where its writer told no number, as stock DCP.

    Retention neither counts nor removes it: it is somebody's copy.
    """
    if manifest.step is None or manifest.step == step:
        return None
    return f"it holds step {manifest.step}: it is a copy of that step, or was renamed"
