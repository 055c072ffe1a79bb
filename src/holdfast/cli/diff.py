"""`holdfast diff`: compare two checkpoints, in any formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from holdfast.catalog.findings import components_of, name_in_model
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import read_value
from holdfast.cli.compare import ComparedTensor, Difference, compare, nbytes_to_read
from holdfast.cli.terminal import (
    POSITIONAL,
    JsonOptions,
    parsed,
    progress,
    say,
    say_json,
    spelled_shape,
)
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError
from holdfast.format.components import MODEL
from holdfast.format.manifest import Manifest
from holdfast.format.structure import types_by_path
from holdfast.hf.dialects import dialect_of, renamed
from holdfast.spelling import counted
from holdfast.tensors.stored import StoredTensors

LINES_MAX = 200
"""Maximum number of differences to print."""


@dataclass(frozen=True, slots=True)
class DiffArguments(JsonOptions):
    """Compare two checkpoints: names, shapes, dtypes and elements, and by how much they differ.
    Either may be a checkpoint of Holdfast or of stock torch.distributed.checkpoint, a Hugging Face
    folder or a .pt file. Where only one has Hugging Face's tensor names, both are compared under
    Meta's names. Data with equal checksums on both sides is not read. Exits with 6 where anything
    differs.

    Example: holdfast diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000
    """

    a: str = field(metadata=POSITIONAL)
    """Path or URL of a checkpoint."""

    b: str = field(metadata=POSITIONAL)
    """Path or URL of another checkpoint."""

    model_only: bool = False
    """Leave out everything but the model: optimizer, schedule, values."""

    hf_assets: str | None = None
    """Folder with the config.json of the Hugging Face model, where its own folder has none."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast diff`: print the differences of two checkpoints. Return the exit status."""
    options = parsed(DiffArguments, "diff", arguments)
    opened = open_any(*open_for_reading(options.a)), open_any(*open_for_reading(options.b))
    a, b = comparable_tensors(opened, options)
    pairs = [(name, a.get(name), b.get(name)) for name in {**a, **b}]
    nbytes = sum(nbytes_to_read(in_a, in_b) for _, in_a, in_b in pairs if in_a and in_b)
    with progress("comparing", nbytes) as advance:
        differences = [compare(name, in_a, in_b, advance) for name, in_a, in_b in pairs]
    values = {} if options.model_only else _compared_values(opened)
    if options.json:
        tensors = [asdict(difference) for difference in differences]
        say_json({"a": options.a, "b": options.b, "tensors": tensors, "values": values})
    else:
        _say(differences, values)
    num_differing = sum(difference.state != "equal" for difference in differences)
    num_differing += sum(state != "equal" for state in values.values())
    if num_differing:
        where = f"`{options.a}` and `{options.b}`"
        raise MismatchError(f"{where} differ in {counted(num_differing, 'place')}")
    return 0


def comparable_tensors(
    opened: tuple[OpenCheckpoint, OpenCheckpoint], options: DiffArguments
) -> tuple[dict[str, ComparedTensor], dict[str, ComparedTensor]]:
    """Return the tensors of both checkpoints, by the names under which to compare them.

    If the checkpoints have different dialects of tensor names, use Meta's names for both.
    """
    names = [_names(checkpoint.manifest, model_only=options.model_only) for checkpoint in opened]
    dialects = [dialect_of(of_one.values()) for of_one in names]
    if dialects[0] == dialects[1] or None in dialects:
        return _under(names[0], opened[0]), _under(names[1], opened[1])
    sides = []
    for path, checkpoint, of_one, dialect in zip(
        (options.a, options.b), opened, names, dialects, strict=True
    ):
        if dialect == "hf":
            sides.append(_converted(path, options.hf_assets))
        else:
            meta = renamed(of_one.values(), "meta")
            sides.append(_under({name: meta[own] for name, own in of_one.items()}, checkpoint))
    return sides[0], sides[1]


def _names(manifest: Manifest, *, model_only: bool) -> dict[str, str]:
    """Return stored name -> name under which to compare the tensor.

    A tensor of the model is compared under its name in the state dict of the model. `model_only`:
    leave out tensors of other components.
    """
    names, components = {}, components_of(manifest)
    for name, entry in manifest.tensors.items():
        if components[name] == MODEL:
            names[name] = name_in_model(entry.path)
        elif not model_only:
            names[name] = name
    return names


def _under(names: Mapping[str, str], checkpoint: OpenCheckpoint) -> dict[str, ComparedTensor]:
    stored, source = StoredTensors(checkpoint.source, checkpoint.strides), checkpoint.source
    return {shown: ComparedTensor(stored, name, source) for name, shown in names.items()}


def _converted(path: str, assets: str | None) -> dict[str, ComparedTensor]:
    """Return the tensors of the Hugging Face model at `path`, by Meta's names.

    They are converted when read. `assets`: folder with `config.json`, if `path` has none.
    """
    outputs = plan(path, ConvertOptions(to="dcp", names="meta", hf_assets=assets)).outputs
    return {name: ComparedTensor(output.tensors, output.name) for name, output in outputs.items()}


def _compared_values(opened: tuple[OpenCheckpoint, OpenCheckpoint]) -> dict[str, str]:
    """Compare the values of two checkpoints by their stored bytes and by their types, such as
    `b""` and the dtypes of numpy scalars.

    Return name of the value -> `equal`, `differs`, `only in a` or `only in b`. The result is empty
    if one of the checkpoints is a file of `torch.save`, or has no values.
    """
    a, b = (checkpoint.manifest.values for checkpoint in opened)
    if opened[0].values or opened[1].values or not a or not b:
        return {}
    types = [types_by_path(one.manifest.structure) for one in opened]
    states = {}
    for name in {**a, **b}:
        if name not in a or name not in b:
            states[name] = "only in b" if name not in a else "only in a"
        elif types[0].get(a[name].path) != types[1].get(b[name].path):
            states[name] = "differs"
        elif a[name].checksum is not None and a[name].checksum == b[name].checksum:
            states[name] = "equal"
        else:
            stored = [read_value(one.source, name, one.manifest.values[name]) for one in opened]
            states[name] = "equal" if stored[0] == stored[1] else "differs"
    return states


def _say(differences: Sequence[Difference], values: Mapping[str, str]) -> None:
    lines = [
        f"{one.state}: {one.name}  {_spelled(one)}" for one in differences if one.state != "equal"
    ]
    lines += [f"{state}: {name}  value" for name, state in values.items() if state != "equal"]
    for line in lines[:LINES_MAX]:
        say(line)
    if len(lines) > LINES_MAX:
        say(f"and {len(lines) - LINES_MAX} more: --json lists all")
    equal = [difference for difference in differences if difference.state == "equal"]
    num_by_checksum = sum(difference.by_checksum for difference in equal)
    summary = f"equal: {counted(len(equal), 'tensor')}"
    summary += f", {num_by_checksum} of them by recorded checksums" if num_by_checksum else ""
    equal_values = sum(state == "equal" for state in values.values())
    say(summary + (f", {counted(equal_values, 'value')}" if values else ""))


def _spelled(difference: Difference) -> str:
    dtypes = [dtype for dtype in dict.fromkeys(difference.dtypes) if dtype]
    shapes = [spelled_shape(s) for s in dict.fromkeys(difference.shapes) if s is not None]
    words = [" -> ".join(dtypes), " -> ".join(shapes)]
    if difference.num_differing:
        words.append(f" {difference.num_differing:,} of {difference.num_elements:,} elements")
        words.append(f"differ by up to {difference.max_abs:.3g},")
        words.append(f"{difference.max_rel:.3g} of their size")
    return " ".join(words)
