"""Which step a resume takes. Runs on one rank; what it finds goes to all."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.findings import kind_of
from holdfast.errors import HoldfastError
from holdfast.format.manifest import Manifest
from holdfast.format.names import step_name


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is there, and what it holds."""

    step: int
    manifest: Manifest


def newest_resumable(catalog: Catalog, below: int | None) -> tuple[Step | None, list[str]]:
    """The newest step (below one, where given) that looks whole and can be resumed from, and a line
    on each newer one that is neither. Its data is checked as it is read, not here."""
    refused = []
    for step in reversed(catalog.steps()):
        if below is not None and step >= below:
            continue
        try:
            manifest = catalog.open(step_name(step))
        except HoldfastError as error:
            refused.append(f"step {step}: {error.what}")
            continue
        if kind_of(manifest) == "full" or step == 0:
            return Step(step, manifest), refused
        refused.append(f"step {step}: it holds the model alone, and cannot be resumed from")
    return None, refused


def newest_final(catalog: Catalog) -> int | None:
    """The newest step that looks whole, if it holds the model alone and is no seed."""
    for step in reversed(catalog.steps()):
        try:
            manifest = catalog.open(step_name(step))
        except HoldfastError:
            continue
        return step if step > 0 and kind_of(manifest) == "model" else None
    return None


def is_whole(catalog: Catalog, step: int) -> bool:
    """Whether every file of a step is there in full."""
    try:
        catalog.open(step_name(step))
    except HoldfastError:
        return False
    return True
