"""`holdfast diff`: what differs between two checkpoints, whatever formats they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from holdfast.catalog.findings import name_in_model, parts_of
from holdfast.catalog.open_any import OpenCheckpoint, open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.source import read_value
from holdfast.cli.compare import ComparedTensor, Difference, compare, nbytes_to_read
from holdfast.cli.terminal import parsed, progress, say, say_json
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError
from holdfast.format.manifest import Manifest
from holdfast.hf.dialects import dialect_of, renamed
from holdfast.spelling import counted
from holdfast.tensors.stored import StoredTensors

if TYPE_CHECKING:
    import tyro

LISTED_MAX = 200


@dataclass(frozen=True, slots=True)
class DiffArguments:
    """What differs between two checkpoints: names, shapes, dtypes, and the elements, by how much.
    Either may be a step, a folder of stock torch.distributed.checkpoint or of Hugging Face, or a
    .pt file; where one has Hugging Face's names, it is compared through the table of its family.
    What has the same checksums on both sides is not read. Exits with 6 where anything differs.

    Example: holdfast diff outputs/checkpoint/step-500 outputs/checkpoint/step-1000
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint, or its URL."""

    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """Checkpoint, or its URL."""

    model_only: bool = False
    """Leave out what is not the model's: optimizer, schedule, values."""

    hf_assets: str | None = None
    """Folder with the config.json of the Hugging Face side, where it has none itself."""

    json: bool = False
    """Print JSON, with what is equal, too."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Compare, print what differs; the exit status."""
    asked = parsed(DiffArguments, "diff", arguments)
    seen = open_any(*open_for_reading(asked.a)), open_any(*open_for_reading(asked.b))
    a, b = sides(seen, asked)
    pairs = [(name, a.get(name), b.get(name)) for name in [*a, *(n for n in b if n not in a)]]
    nbytes = sum(nbytes_to_read(one, other) for _, one, other in pairs if one and other)
    with progress("comparing", nbytes) as advance:
        found = [compare(name, one, other, advance) for name, one, other in pairs]
    values = {} if asked.model_only else _values(seen)
    if asked.json:
        listed = [asdict(one) for one in found]
        say_json({"a": asked.a, "b": asked.b, "tensors": listed, "values": values})
    else:
        _say(found, values)
    differing = sum(not one.same for one in found)
    differing += sum(state != "equal" for state in values.values())
    if differing:
        raise MismatchError(f"`{asked.a}` and `{asked.b}` differ in {counted(differing, 'place')}")
    return 0


def sides(
    seen: tuple[OpenCheckpoint, OpenCheckpoint], asked: DiffArguments
) -> tuple[dict[str, ComparedTensor], dict[str, ComparedTensor]]:
    """The tensors of both under the names that they are compared by: as they are, and where the
    two use different ones, as Meta's.

    Raises:
        MismatchError: one has Hugging Face's names, and is not of the family that it says.
        UsageError: it does not say of which.
    """
    called = [_names(one.manifest, model_only=asked.model_only) for one in seen]
    dialects = [dialect_of(names.values()) for names in called]
    if dialects[0] == dialects[1] or None in dialects:
        return _as_called(seen[0], called[0]), _as_called(seen[1], called[1])
    found = []
    for path, one, names, dialect in zip((asked.a, asked.b), seen, called, dialects, strict=True):
        if dialect == "hf":
            found.append(_through_table(path, asked.hf_assets))
        else:
            meta = renamed(names.values(), "meta")
            found.append(_as_called(one, {name: meta[ours] for name, ours in names.items()}))
    return found[0], found[1]


def _names(manifest: Manifest, *, model_only: bool) -> dict[str, str]:
    """For each tensor its name; of the model's, as its own state dict has them."""
    called, parts = {}, parts_of(manifest)
    for name, entry in manifest.tensors.items():
        if parts[name] == "model":
            called[name] = name_in_model(entry.path)
        elif not model_only:
            called[name] = name
    return called


def _as_called(seen: OpenCheckpoint, called: Mapping[str, str]) -> dict[str, ComparedTensor]:
    stored, entries = StoredTensors(seen.source, seen.strides), seen.manifest.tensors
    return {
        ours: ComparedTensor(stored, name, seen.source, entries[name])
        for name, ours in called.items()
    }


def _through_table(path: str, assets: str | None) -> dict[str, ComparedTensor]:
    """The tensors of a Hugging Face folder as a conversion would write them."""
    outputs = plan(path, ConvertOptions(to="dcp", names="meta", hf_assets=assets)).outputs
    return {name: ComparedTensor(output.tensors, output.name) for name, output in outputs.items()}


def _values(seen: tuple[OpenCheckpoint, OpenCheckpoint]) -> dict[str, str]:
    """What is not a tensor, by its bytes; between formats that keep it in different ways, not."""
    a, b = (one.manifest.values for one in seen)
    if "torch" in (seen[0].format, seen[1].format) or not a or not b:
        return {}
    found = {}
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            found[name] = "only in b" if name not in a else "only in a"
        elif a[name].checksum is not None and a[name].checksum == b[name].checksum:
            found[name] = "equal"
        else:
            held = [read_value(one.source, name, one.manifest.values[name]) for one in seen]
            found[name] = "equal" if held[0] == held[1] else "differs"
    return found


def _say(found: Sequence[Difference], values: Mapping[str, str]) -> None:
    lines = [f"{one.state}: {one.name}  {_spelled(one)}" for one in found if not one.same]
    lines += [f"{state}: {name}  value" for name, state in values.items() if state != "equal"]
    for line in lines[:LISTED_MAX]:
        say(line)
    if len(lines) > LISTED_MAX:
        say(f"and {len(lines) - LISTED_MAX} more: --json lists all")
    same = [one for one in found if one.same]
    unread = sum(one.by_checksum for one in same)
    said = f"equal: {counted(len(same), 'tensor')}"
    said += f", {unread} of them by checksums" if unread else ""
    equal = sum(state == "equal" for state in values.values())
    say(said + (f", {counted(equal, 'value')}" if values else ""))


def _spelled(one: Difference) -> str:
    dtypes = [dtype for dtype in dict.fromkeys(one.dtypes) if dtype]
    shapes = ["x".join(map(str, s)) or "scalar" for s in dict.fromkeys(one.shapes) if s is not None]
    said = [" -> ".join(dtypes), " -> ".join(shapes)]
    if one.num_differing:
        said.append(f" {one.num_differing:,} of {one.num_elements:,} elements")
        said.append(f"differ by up to {one.max_abs:.3g}, {one.max_rel:.3g} of their size")
    return " ".join(said)
