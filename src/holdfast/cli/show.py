"""`holdfast show`: what a checkpoint holds, and where each tensor of it lies."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from holdfast.catalog.findings import FORMATS, components_of, kind_of
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.cli import values
from holdfast.cli.picture import draw, letter
from holdfast.cli.terminal import parsed, progress, say, say_json
from holdfast.cli.tree import INDENT, count, lines, tree_of
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.components import COMPONENTS
from holdfast.format.manifest import Chunk, Manifest, TensorEntry
from holdfast.spelling import counted, spelled_bytes, spelled_layout

if TYPE_CHECKING:
    import tyro

CHUNKS_SAID_MAX = 52

VALUES_SAID_MAX = 100
"""Values of which a line is printed; names of optimizers' options are thousands."""


@dataclass(frozen=True, slots=True)
class ShowArguments:
    """What a checkpoint holds: its tensors as a tree, how many parameters, who wrote it. With NAME,
    one tensor and where each chunk of it lies, one value as it is, or all below that name. Takes
    steps of Holdfast and of stock torch.distributed.checkpoint, folders and files of safetensors,
    .pt files.

    Example: holdfast show outputs/checkpoint/step-500
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Checkpoint, or its URL."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Tensor or value, or beginning of the names of some."""

    each: bool = False
    """List blocks that are alike one by one."""

    stats: bool = False
    """With NAME: read the tensor; least and greatest, mean and deviation, zeros, NaN, infinite."""

    values: bool = False
    """With NAME: its first elements."""

    json: bool = False
    """Print JSON, with every chunk."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Print what is there; the exit status."""
    asked = parsed(ShowArguments, "show", arguments)
    seen = open_any(*open_for_reading(asked.path))
    tensors, names = chosen(seen, asked.name), values.below(seen, asked.name)
    entry = tensors.get(asked.name)
    data = _data(asked, seen, entry)
    if asked.json:
        held = {"contents": values.as_json(seen, names)} if names else {}
        say_json({**_as_json(seen, tensors), **data, **held})
        return 0
    if entry is not None:
        _say_tensor(asked.name, entry)
        _say_data(data)
        return 0
    if not asked.name:
        _say_checkpoint(seen)
    # A stable sort: the model first, as it lies there, then what a resume needs beside it.
    of = components_of(seen.manifest)
    ordered = sorted(tensors.items(), key=lambda member: of[member[0]] != "model")
    for line in lines(tree_of(dict(ordered)), each=asked.each):
        say(line)
    _say_values(seen, names)
    return 0


def chosen(seen: OpenCheckpoint, name: str) -> Mapping[str, TensorEntry]:
    """The tensors that a name, or the beginning of names, stands for.

    Raises:
        NotFoundError: there is nothing of that name.
    """
    tensors = seen.manifest.tensors
    if not name:
        return tensors
    if name in tensors:
        return {name: tensors[name]}
    below = {one: entry for one, entry in tensors.items() if one.startswith(f"{name}.")}
    if not below and not values.below(seen, name):
        near = difflib.get_close_matches(name, seen.manifest.names(), n=3)
        raise NotFoundError(
            f"`{seen.where}` holds no `{name}`",
            hint=f"near it: {', '.join(near)}" if near else f"holdfast show {seen.where}",
        )
    return below


def _data(asked: ShowArguments, seen: OpenCheckpoint, entry: TensorEntry | None) -> dict[str, Any]:
    """What is known of the tensor's elements, where that is asked for, or there is only one: the
    steps that a loop counts are often a tensor."""
    single = entry is not None and prod(entry.shape) == 1
    if not asked.stats and not asked.values and not single:
        return {}
    if asked.name in seen.manifest.values and not asked.stats:
        return {}  # A value is shown whether or not it is asked for.
    if entry is None:
        raise UsageError(
            "`--stats` and `--values` read one tensor",
            hint=f"its name after the path: holdfast show {asked.path} NAME --stats",
        )
    # Not at the top: they need numpy, for which the tree does not wait.
    from holdfast.cli.elements import WITHOUT_NUMBERS, corner, statistics
    from holdfast.tensors.stored import StoredTensors

    stored = StoredTensors(seen.source, seen.strides)
    found: dict[str, Any] = {}
    if asked.stats:
        with progress(asked.name, entry.nbytes) as advance:
            found["statistics"] = asdict(statistics(stored, asked.name, advance))
    if asked.values or (single and entry.dtype not in WITHOUT_NUMBERS):
        found["first"] = corner(stored, asked.name)
    return found


def _say_values(seen: OpenCheckpoint, names: Sequence[str]) -> None:
    """Each value with its name, its container and the file that holds it."""
    shown = names[:VALUES_SAID_MAX]
    for name, value in zip(shown, values.spelled(seen, shown), strict=True):
        entry = seen.manifest.values[name]
        nbytes = "" if seen.format == "torch" else f"{spelled_bytes(entry.item.nbytes)}  "
        say(f"{name}  {value}  {nbytes}{entry.file}")
    if len(names) > len(shown):
        say(f"and {len(names) - len(shown)} more values: --json lists all")


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


def _say_checkpoint(seen: OpenCheckpoint) -> None:
    manifest = seen.manifest
    facts = [FORMATS[seen.format]]
    if manifest.step is not None:
        facts.append(f"step {manifest.step}")
    files = counted(len(manifest.files), "file")
    held = parts(manifest)
    known = manifest.components is not None or {"model", *COMPONENTS} >= held.keys()
    if "model" in held and known:
        facts.append(kind_of(manifest))
    facts.append(f"{spelled_bytes(manifest.nbytes)} in {files}")
    say(f"{seen.where}: {', '.join(facts)}")
    if manifest.created:
        by = spelled_layout(manifest.layout) or "unknown ranks"
        say(f"{INDENT}written {manifest.created} by {by}")
    if manifest.versions:
        versions = (f"{name} {version}" for name, version in manifest.versions.items())
        say(f"{INDENT}with {', '.join(versions)}")
    for part, facts_of in held.items():
        elements, nbytes = facts_of["elements"], facts_of["nbytes"]
        what = "parameters and buffers" if part == "model" else "elements"
        has = [f"{elements:,} {what}, {spelled_bytes(nbytes)}"] if facts_of["tensors"] else []
        has += [counted(facts_of["values"], "value")] if facts_of["values"] else []
        say(f"{INDENT}{part}: {', '.join(has)}")
    say()


def parts(manifest: Manifest) -> dict[str, dict[str, int]]:
    """What each part of a checkpoint holds; what two names share counts once."""
    tensors: dict[str, list[TensorEntry]] = {}
    num_values: dict[str, int] = {}
    of = components_of(manifest)
    for name, entry in manifest.tensors.items():
        tensors.setdefault(of[name], []).append(entry)
    for name in manifest.values:
        num_values[of[name]] = num_values.get(of[name], 0) + 1
    found = {}
    for part in sorted({*tensors, *num_values}, key=lambda part: (part != "model", part)):
        entries = tensors.get(part, [])
        elements, nbytes = count(entries)
        found[part] = {
            "tensors": len(entries),
            "elements": elements,
            "nbytes": nbytes,
            "values": num_values.get(part, 0),
        }
    return found


def _say_tensor(name: str, entry: TensorEntry) -> None:
    chunks = sorted(entry.chunks, key=lambda chunk: chunk.region.start)
    shape = "x".join(map(str, entry.shape)) or "scalar"
    files = counted(len({chunk.file for chunk in chunks}), "file")
    cut = f"{counted(len(chunks), 'chunk')} in {files}"
    say(f"{name}  {entry.dtype} {shape}  {spelled_bytes(entry.nbytes)}  {cut}")
    for line in draw(entry.shape, [chunk.region for chunk in chunks]):
        say(f"{INDENT}{line}")
    for index, chunk in enumerate(chunks[:CHUNKS_SAID_MAX]):
        say(f"{INDENT}{letter(index)}  {_spelled_region(chunk)}  {_spelled_place(chunk)}")
    if len(chunks) > CHUNKS_SAID_MAX:
        say(f"{INDENT}and {len(chunks) - CHUNKS_SAID_MAX} more: --json lists all")


def _spelled_region(chunk: Chunk) -> str:
    bounds = zip(chunk.region.start, chunk.region.stop, strict=True)
    return f"[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"


def _spelled_place(chunk: Chunk) -> str:
    start = chunk.item.offset if chunk.data_offset is None else chunk.data_offset
    return f"{chunk.file} from byte {start}"


def _as_json(seen: OpenCheckpoint, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    manifest = seen.manifest
    return {
        "path": seen.where,
        "format": seen.format,
        "step": manifest.step,
        "kind": kind_of(manifest),
        "nbytes": manifest.nbytes,
        "created": manifest.created or None,
        "layout": dict(manifest.layout),
        "versions": dict(manifest.versions),
        "files": dict(manifest.files),
        "parts": parts(manifest),
        "tensors": {
            name: {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "nbytes": entry.nbytes,
                "chunks": [
                    {
                        "start": chunk.region.start,
                        "stop": chunk.region.stop,
                        "file": chunk.file,
                        "item": [chunk.item.offset, chunk.item.nbytes],
                        "data": chunk.data_offset,
                    }
                    for chunk in entry.chunks
                ],
            }
            for name, entry in tensors.items()
        },
        "values": sorted(manifest.values),
    }
