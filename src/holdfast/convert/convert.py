"""Any checkpoint to a step, a Hugging Face folder or a `.pt` file."""

from __future__ import annotations

import time
from dataclasses import dataclass

from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.steady import UNREADABLE
from holdfast.convert.plan import ConvertOptions, Planned
from holdfast.convert.stream import Advance
from holdfast.convert.target import (
    ConvertTarget,
    HFFiles,
    Values,
    check_number,
    facts_of,
    open_target,
    write_hf,
    write_step,
    write_torch_file,
)
from holdfast.errors import NotFoundError
from holdfast.format.manifest import Kind, Path
from holdfast.format.structure import Node


@dataclass(frozen=True, slots=True)
class Converted:
    """A conversion that came to its end."""

    where: str
    nbytes: int
    """Of the target's files."""

    kept_bytes: int
    """Of these, what an earlier conversion that was killed had written already."""

    seconds: float
    num_tensors: int


def convert(planned: Planned, target: str, options: ConvertOptions, advance: Advance) -> Converted:
    """As `convert_to`, to the place at the path `target`.

    Raises:
        UsageError: the state of one step, to the folder of another; or no place to write to.
    """
    # First, so that no folder is made for values that cannot be converted.
    values = values_of(planned, options)
    if options.to == "dcp":
        check_number(target, _kind(planned), planned.opened.manifest.step)
    sources = [planned.opened.path, *([] if planned.assets is None else [planned.assets])]
    place = open_target(
        target, overwrite=options.overwrite, sources=sources, file=options.to == "torch"
    )
    return convert_to(place, planned, values, options, advance)


def convert_to(
    place: ConvertTarget,
    planned: Planned,
    values: Values,
    options: ConvertOptions,
    advance: Advance,
) -> Converted:
    """Write what was planned, and its values, to a target, which is absent until it is whole.

    Goes on where an earlier conversion to it was killed.

    Holds a few blocks of 32 MB in memory, whatever the size of the model.

    Raises:
        ExistsError: something is there, or came there meanwhile.
        StorageError: no space, no rights; nothing is left behind.
        DamagedError: bytes of the source are not those that were written.
        NotFoundError: another process has replaced or removed the source meanwhile.
    """
    started = time.perf_counter()
    try:
        nbytes = _written(place, planned, values, options, advance)
    except UNREADABLE as error:
        if not planned.opened.is_gone:
            raise
        raise NotFoundError(
            f"`{planned.opened.path}` has been replaced or removed while it was converted",
            hint="run the command again",
        ) from error
    seconds = time.perf_counter() - started
    kept_bytes = place.files.kept_bytes
    return Converted(place.where, nbytes, kept_bytes, seconds, len(planned.outputs))


def _written(
    place: ConvertTarget,
    planned: Planned,
    values: Values,
    options: ConvertOptions,
    advance: Advance,
) -> int:
    """Write the target. Returns its bytes."""
    outputs, opened = planned.outputs, planned.opened
    if options.to == "hf":
        shard_bytes = options.max_shard_bytes
        return write_hf(place, outputs, _beside(planned), shard_bytes, advance)
    if options.to == "torch":
        return write_torch_file(place, outputs, values, advance)
    components = opened.manifest.components
    facts = facts_of(
        place,
        kind=_kind(planned),
        step=opened.manifest.step,
        model=planned.config or opened.manifest.model,
        components=() if components is not None and options.model_only else components,
    )
    structure = _structure(planned, values)
    return write_step(place, outputs, values, facts, advance, structure=structure)


def _kind(planned: Planned) -> Kind:
    """Kind of the checkpoint that is written."""
    if not planned.whole:
        return "model"
    return planned.opened.manifest.kind or ("full" if planned.opened.others else "model")


def _structure(planned: Planned, values: Values) -> dict[Path, Node] | None:
    """The structure of the source, as far as all that it describes is in the target."""
    manifest = planned.opened.manifest
    if manifest.structure is None:
        return None
    kept = {output.path for output in planned.outputs.values()} | {at for at, _ in values.values()}
    entries = [one.path for one in manifest.tensors.values()]
    entries += [one.path for one in manifest.values.values()]
    lost = [path for path in entries if path not in kept]
    return {
        path: node
        for path, node in manifest.structure.items()
        if not any(one[: len(path)] == path for one in lost)
    }


def values_of(planned: Planned, options: ConvertOptions) -> Values:
    """What is not a tensor, as the target keeps it."""
    if options.to == "hf" or options.model_only or not planned.opened.manifest.values:
        return {}
    from holdfast.convert.values import as_containers, as_pickles

    return as_pickles(planned.opened) if options.to == "torch" else as_containers(planned.opened)


def _beside(planned: Planned) -> HFFiles:
    assert planned.config is not None, "an export is mapped, and so has a configuration"
    where = planned.assets
    if where is None and planned.opened.has_config:
        where = planned.opened.where
    return HFFiles(planned.config, None if where is None else open_for_reading(where))
