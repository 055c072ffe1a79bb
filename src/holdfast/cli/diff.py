"""`holdfast diff`: what differs between two checkpoints, whatever formats they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from holdfast.cli.compare import Difference, Side, compare, nbytes_to_read
from holdfast.cli.terminal import counted, parsed, progress, say, say_json
from holdfast.convert.plan import Wishes, plan
from holdfast.convert.source import Opened, open_source
from holdfast.engine.source import read_value
from holdfast.errors import MismatchError
from holdfast.hf.dialects import renamed
from holdfast.hf.tensors import Renamed

LISTED_MAX = 200


@dataclass(frozen=True, slots=True)
class Diff:
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
    asked = parsed(Diff, "diff", arguments)
    opened = open_source(asked.a), open_source(asked.b)
    sides = _sides(opened, asked)
    names = [*sides[0], *(name for name in sides[1] if name not in sides[0])]
    pairs = [(name, sides[0].get(name), sides[1].get(name)) for name in names]
    nbytes = sum(nbytes_to_read(a, b) for _, a, b in pairs if a and b)
    with progress("comparing", nbytes) as advance:
        found = [compare(name, a, b, advance) for name, a, b in pairs]
    values = {} if asked.model_only else _values(opened)
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


def _sides(opened: tuple[Opened, Opened], asked: Diff) -> tuple[dict[str, Side], dict[str, Side]]:
    """The tensors of both under the names that they are compared by."""
    dialects = {one.dialect for one in opened}
    alike = len(dialects) == 1 or None in dialects
    a, b = opened
    return _side(a, asked.a, alike, asked), _side(b, asked.b, alike, asked)


def _side(opened: Opened, path: str, alike: bool, asked: Diff) -> dict[str, Side]:
    """Tensors as they are called; where the two sides call them differently, as Meta does."""
    if not alike and opened.dialect == "hub":
        wishes = Wishes(to="dcp", names="meta", hf_assets=asked.hf_assets)
        outputs = plan(path, wishes).outputs
        return {name: Side(output.tensors, output.name) for name, output in outputs.items()}
    held = opened.model.held
    called = {name: name for name in held} if alike else renamed(held, "meta")
    model = Renamed(opened.model, called)
    entries = opened.manifest.tensors
    sides = {}
    for name in held:
        original = opened.originals.get(name)
        entry = None if original is None else entries[original]
        sides[called[name]] = Side(model, called[name], opened.source, entry)
    for name in () if asked.model_only else opened.others:
        sides[name] = Side(opened.stored, name, opened.source, entries[name])
    return sides


def _values(opened: tuple[Opened, Opened]) -> dict[str, str]:
    """What is not a tensor, by its bytes; between formats that keep it in different ways, not."""
    a, b = (one.manifest.values for one in opened)
    if "torch" in (opened[0].format, opened[1].format) or not a or not b:
        return {}
    found = {}
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            found[name] = "only in b" if name not in a else "only in a"
        elif a[name].checksum is not None and a[name].checksum == b[name].checksum:
            found[name] = "equal"
        else:
            held = [read_value(o.source, name, o.manifest.values[name]) for o in opened]
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
