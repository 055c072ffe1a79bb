"""`holdfast show`: the tensors and values in a checkpoint, and where each is stored."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from holdfast.catalog.findings import FORMATS, components_of, kind_of
from holdfast.catalog.open_any import OpenCheckpoint, check_exists, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.cli import values
from holdfast.cli.described import config_of, description
from holdfast.cli.picture import draw, letter
from holdfast.cli.terminal import (
    POSITIONAL,
    JsonOptions,
    parsed,
    progress,
    say,
    say_json,
    spelled_shape,
)
from holdfast.cli.tree import INDENT, count, lines, tree_of
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.components import COMPONENTS, MODEL
from holdfast.format.manifest import Chunk, Manifest, TensorEntry
from holdfast.spelling import counted, spelled_bytes, spelled_layout

CHUNKS_MAX = 52
"""Maximum number of chunks of a tensor to print."""

NOTES_MAX = 20
"""Maximum number of notes to print."""

VALUES_MAX = 100
"""Maximum number of values to print, since an optimizer can have thousands of options."""


@dataclass(frozen=True, slots=True)
class ShowArguments(JsonOptions):
    """Show what a checkpoint holds: its tensors as a tree, the number of parameters, the
    configuration of its model, who wrote it.
    With NAME: one tensor and where each chunk of it is stored, one value, or everything below that
    name. Takes checkpoints of Holdfast and of stock torch.distributed.checkpoint, folders and files
    of safetensors, .pt files.

    Example: holdfast show outputs/checkpoint/step-500
    """

    path: str = field(metadata=POSITIONAL)
    """Path or URL of a checkpoint."""

    name: str = field(default="", metadata=POSITIONAL)
    """Name of a tensor or value, or the beginning of several names."""

    each: bool = False
    """List every layer, even if several are equal."""

    stats: bool = False
    """With NAME: read the tensor, and print minimum, maximum, mean, standard deviation, and the
    numbers of zeros, NaN and infinities."""

    values: bool = False
    """With NAME: print its first elements."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast show`: print the contents of a checkpoint. Return the exit status."""
    options = parsed(ShowArguments, "show", arguments)
    store, name = open_for_reading(options.path)
    check_exists(store, name)
    checkpoint = open_any(store, name)
    tensors = chosen(checkpoint, options.name)
    names = values.below(checkpoint, options.name)
    entry = tensors.get(options.name)
    data = _data(options, checkpoint, entry)
    if options.json:
        if names:
            read = values.read(checkpoint, names)
            data["contents"] = {name: values.as_json(value) for name, value in read}
        say_json({**_as_json(checkpoint, tensors), **data})
        return 0
    if entry is not None:
        _say_tensor(options.name, entry)
        _say_data(data)
        return 0
    if not options.name:
        _say_checkpoint(checkpoint)
    # Put the model first. The sort is stable, so each component keeps its stored order.
    components = components_of(checkpoint.manifest)
    ordered = sorted(tensors.items(), key=lambda member: components[member[0]] != MODEL)
    for line in lines(tree_of(dict(ordered)), each=options.each):
        say(line)
    _say_values(checkpoint, names)
    return 0


def chosen(checkpoint: OpenCheckpoint, name: str) -> Mapping[str, TensorEntry]:
    """Return the entry of tensor `name`, or of all tensors below that name, by name of the tensor.

    If `name` is empty, return the entries of all tensors.
    """
    tensors = checkpoint.manifest.tensors
    if not name:
        return tensors
    if name in tensors:
        return {name: tensors[name]}
    below = {other: entry for other, entry in tensors.items() if other.startswith(f"{name}.")}
    if not below and not values.below(checkpoint, name):
        near = ", ".join(difflib.get_close_matches(name, checkpoint.manifest.names(), n=3))
        hint = f"similar names: {near}" if near else f"holdfast show {checkpoint.where}"
        raise NotFoundError(f"`{checkpoint.where}` holds no `{name}`", hint=hint)
    return below


def _data(
    options: ShowArguments, checkpoint: OpenCheckpoint, entry: TensorEntry | None
) -> dict[str, Any]:
    """Return the statistics and the first elements of a tensor, if the options request them.

    `entry`: entry of that tensor; None if the options do not name a tensor.

    The element of a one-element tensor is always returned, since such tensors are often step
    counters.
    """
    single = entry is not None and prod(entry.shape) == 1
    if not options.stats and not options.values and not single:
        return {}
    if options.name in checkpoint.manifest.values and not options.stats:
        # A value is not a tensor: the caller prints it with or without `--values`.
        return {}
    if entry is None:
        raise UsageError(
            "`--stats` and `--values` read one tensor",
            hint=f"its name after the path: holdfast show {options.path} NAME --stats",
        )
    # Imported here, since both modules import numpy, which the tree of names does not need.
    from holdfast.cli.elements import WITHOUT_NUMBERS, corner, statistics
    from holdfast.tensors.stored import StoredTensors

    stored = StoredTensors(checkpoint.source, checkpoint.strides)
    data: dict[str, Any] = {}
    if options.stats:
        with progress(options.name, entry.nbytes) as advance:
            data["statistics"] = asdict(statistics(stored, options.name, advance))
    if options.values or (single and entry.dtype not in WITHOUT_NUMBERS):
        data["first"] = corner(stored, options.name)
    return data


def _say_values(checkpoint: OpenCheckpoint, names: Sequence[str]) -> None:
    """Print each value with its name, the size of its container and its file."""
    for name, value in values.read(checkpoint, names[:VALUES_MAX]):
        entry = checkpoint.manifest.values[name]
        nbytes = "" if name in checkpoint.values else f"{spelled_bytes(entry.item.nbytes)}  "
        say(f"{name}  {values.spelled(value)}  {nbytes}{entry.file}")
    if len(names) > VALUES_MAX:
        say(f"and {len(names) - VALUES_MAX} more values: --json lists all")


def _say_data(data: Mapping[str, Any]) -> None:
    for name, value in data.get("statistics", {}).items():
        spelled = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        say(f"{INDENT}{name.replace('num_', 'number of '):<18} {spelled}")
    rows = data.get("first", [])
    if len(rows) == 1 and len(rows[0]) == 1:
        say(f"{INDENT}{rows[0][0]}")
        return
    for row in rows:
        cells = (f"{v:>12.5g}" if isinstance(v, float) else f"{v!s:>12}" for v in row)
        say(INDENT + " ".join(cells))


def _say_checkpoint(checkpoint: OpenCheckpoint) -> None:
    manifest = checkpoint.manifest
    facts = [FORMATS[checkpoint.format]]
    if manifest.step is not None:
        facts.append(f"step {manifest.step}")
    files = counted(len(manifest.files), "file")
    components = summarized_components(manifest)
    known = manifest.components is not None or {MODEL, *COMPONENTS} >= components.keys()
    if MODEL in components and known:
        facts.append(kind_of(manifest))
    facts.append(f"{spelled_bytes(manifest.nbytes)} in {files}")
    say(f"{checkpoint.where}: {', '.join(facts)}")
    if manifest.created:
        by = spelled_layout(manifest.layout) or "unknown ranks"
        say(f"{INDENT}written {manifest.created} by {by}")
    if manifest.versions:
        versions = (f"{name} {version}" for name, version in manifest.versions.items())
        say(f"{INDENT}with {', '.join(versions)}")
    for component, sums in components.items():
        noun = "parameters and buffers" if component == MODEL else "elements"
        size = f"{sums['elements']:,} {noun}, {spelled_bytes(sums['nbytes'])}"
        held = [size] if sums["tensors"] else []
        held += [counted(sums["values"], "value")] if sums["values"] else []
        say(f"{INDENT}{component}: {', '.join(held)}")
    for line in description(checkpoint):
        say(f"{INDENT}{line}")
    for note in checkpoint.notes[:NOTES_MAX]:
        say(f"{INDENT}note: {note}")
    if len(checkpoint.notes) > NOTES_MAX:
        say(f"{INDENT}and {len(checkpoint.notes) - NOTES_MAX} more notes: --json lists all")
    say()


def summarized_components(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Return the numbers of tensors, elements, bytes and values in each component, by component.

    Elements and bytes of tied tensors count once.
    """
    names: dict[str, list[str]] = {}
    for name, component in components_of(manifest).items():
        names.setdefault(component, []).append(name)
    summary = {}
    for component in sorted(names, key=lambda name: (name != MODEL, name)):
        tensors = [manifest.tensors[n] for n in names[component] if n in manifest.tensors]
        elements, nbytes = count(tensors)
        num_values = len(names[component]) - len(tensors)
        sums = {"tensors": len(tensors), "elements": elements, "nbytes": nbytes}
        summary[component] = {**sums, "values": num_values}
    return summary


def _say_tensor(name: str, entry: TensorEntry) -> None:
    chunks = sorted(entry.chunks, key=lambda chunk: chunk.region.start)
    files = counted(len({chunk.file for chunk in chunks}), "file")
    stored = f"{counted(len(chunks), 'chunk')} in {files}"
    shape = spelled_shape(entry.shape)
    say(f"{name}  {entry.dtype} {shape}  {spelled_bytes(entry.nbytes)}  {stored}")
    for line in draw(entry.shape, [chunk.region for chunk in chunks]):
        say(f"{INDENT}{line}")
    for index, chunk in enumerate(chunks[:CHUNKS_MAX]):
        say(f"{INDENT}{letter(index)}  {_spelled_chunk(chunk)}")
    if len(chunks) > CHUNKS_MAX:
        say(f"{INDENT}and {len(chunks) - CHUNKS_MAX} more: --json lists all")


def _spelled_chunk(chunk: Chunk) -> str:
    bounds = zip(chunk.region.start, chunk.region.stop, strict=True)
    region = f"[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"
    offset = chunk.item.offset if chunk.data_offset is None else chunk.data_offset
    return f"{region}  {chunk.file} from byte {offset}"


def _as_json(checkpoint: OpenCheckpoint, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    manifest = checkpoint.manifest
    return {
        "path": checkpoint.where,
        "format": checkpoint.format,
        "step": manifest.step,
        "kind": kind_of(manifest),
        "nbytes": manifest.nbytes,
        "created": manifest.created or None,
        "layout": dict(manifest.layout),
        "versions": dict(manifest.versions),
        "config": config_of(checkpoint),
        "files": dict(manifest.files),
        "parts": summarized_components(manifest),
        "tensors": {
            name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "nbytes": entry.nbytes,
                "chunks": [_chunk_as_json(chunk) for chunk in entry.chunks],
            }
            for name, entry in tensors.items()
        },
        "values": sorted(manifest.values),
        "notes": checkpoint.notes,
    }


def _chunk_as_json(chunk: Chunk) -> dict[str, Any]:
    bounds, item = asdict(chunk.region), [chunk.item.offset, chunk.item.nbytes]
    return {**bounds, "file": chunk.file, "item": item, "data": chunk.data_offset}
