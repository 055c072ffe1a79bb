"""What is wrong with a checkpoint, as values: each finding, and what is usable all the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.format.manifest import Kind, Manifest, kind_with

Format = Literal["holdfast", "dcp", "safetensors", "torch"]

Concern = Literal["index", "file", "data", "frame"]
"""What a finding is about. `index` and `file`: a load refuses the checkpoint as a whole. `data`: a
load of that entry fails. `frame`: the bytes around an entry; Holdfast does not need them, the stock
reader does."""

FORMATS: Mapping[Format, str] = {
    "holdfast": "checkpoint of Holdfast",
    "dcp": "checkpoint of stock torch.distributed.checkpoint",
    "safetensors": "safetensors",
    "torch": "file of torch.save",
}
"""What each is called, for people."""

PARTS = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng")
"""What a resume can leave out. In a checkpoint whose manifest does not say what is the model's, the
rest is, unless the model has a table."""

TABLES = ("model", "state_dict")
"""Under which others keep a whole model: Accelerate and torchtune; Lightning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was written."""

    concern: Concern
    file: str
    """Within the checkpoint's folder."""

    what: str
    entry: str = ""
    """Tensor or value; empty where it is about the file."""

    block: int | None = None
    """Of the tensor: which of its checksums does not hold."""

    def __str__(self) -> str:
        about = f" `{self.entry}`" if self.entry else ""
        about += f" block {self.block}" if self.block is not None else ""
        # What is about a file reads on as one sentence, unless it is one of its own.
        colon = ":" if about or self.what.startswith("`") else ""
        return f"`{self.file}`{about}{colon} {self.what}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verifying one checkpoint has found."""

    where: str
    format: Format | None
    """None: nothing that says so can be read."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """What could not be checked, or does not belong here; nothing that is wrong."""

    step: int | None = None
    kind: Kind | None = None
    num_entries: int = 0
    nbytes: int = 0
    """Of all data files."""

    usable: str = field(default="everything")
    """What can be done with it, for people."""

    why_not: str | None = None
    """Reason why no run can go on from it, but for its findings and marks; None where one can."""

    @property
    def good(self) -> bool:
        return not self.findings

    @property
    def loads(self) -> bool:
        """Whether Holdfast loads every entry of it."""
        return all(finding.concern == "frame" for finding in self.findings)


MODEL_IS_WHOLE = "model is whole"
"""How `usable` begins where it is."""

NAMED_MAX = 3
"""Entries that a line names of many."""

_NUMBERS = re.compile(r"\b[0-9a-f]{8,}\b|[0-9]+", re.ASCII)


def said_of(findings: Sequence[Finding]) -> str:
    """What is wrong, in one line: the first cause, and how many more there are."""
    first, *others = by_cause(findings)
    return first + (f", and {len(others)} more" if others else "")


def by_cause(findings: Sequence[Finding]) -> list[str]:
    """A line for each cause: findings of one file that say the same of other places are one, with
    how many they are. Where a file is not as long as it was, that is why data in it is not right.
    """
    cut = {f.file for f in findings if f.concern == "file" and not f.entry and _is_size(f)}
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        if finding.file in cut:
            cause: tuple[str, ...] = (finding.file,)
        else:
            cause = finding.concern, finding.file, _NUMBERS.sub("#", finding.what)
        groups.setdefault(cause, []).append(finding)
    return [_line(group) for group in groups.values()]


def _is_size(finding: Finding) -> bool:
    return finding.what.startswith("has ") and finding.what.endswith(" were written")


def _line(group: Sequence[Finding]) -> str:
    first, *others = group
    if first.concern == "file" and first.entry and others:
        # As of a file that is missing: what lies in it is all there is to say of each.
        held = list(dict.fromkeys(f.entry for f in group))
        return f"`{first.file}` {first.what}: in it lie {_named(held)}"
    entries = list(dict.fromkeys(f.entry for f in others if f.entry and f.entry != first.entry))
    if not others:
        return str(first)
    if not entries:
        return f"{first}; and so {len(others)} more of its {'blocks' if first.entry else 'places'}"
    return f"{first}; and so {len(others)} more places, in {_named(entries)}"


def _named(entries: Sequence[str]) -> str:
    named = ", ".join(f"`{entry}`" for entry in entries[:NAMED_MAX])
    more = len(entries) - NAMED_MAX
    return named + (f" and {more} more" if more > 0 else "")


def usable(manifest: Manifest, findings: Sequence[Finding]) -> str:
    """What can be done with a checkpoint that has these findings, for people."""
    if not findings:
        return "everything"
    if all(finding.concern == "frame" for finding in findings):
        return "everything, by Holdfast; stock torch may fail on what is named above"
    refused = [f for f in findings if f.concern in ("index", "file")]
    where = _damaged(manifest, findings)
    whole = sorted({*parts_of(manifest).values()} - where.keys(), key=lambda part: part != "model")
    said = [f"{part} is whole" for part in whole]
    said += [f"{part} is damaged in {', '.join(sorted(where[part]))}" for part in sorted(where)]
    if refused:
        files = ", ".join(sorted({finding.file for finding in refused}))
        said.append(f"a load refuses this checkpoint as long as {files} is not as it was written")
    elif "model" in whole:
        leave = ", ".join(sorted(where))
        said.append(f"a model-only resume is possible, without {leave}")
    return "; ".join(said)


def kind_of(manifest: Manifest) -> Kind:
    """What a checkpoint holds, also where its writer, stock DCP, did not say."""
    if manifest.kind is not None:
        return manifest.kind
    return kind_with(entry.path[0] for entry in manifest.tensors.values())


def parts_of(manifest: Manifest) -> dict[str, str]:
    """For each entry the part of the checkpoint that it belongs to: `model`, or another.

    The manifest may say which top-level names are not the model's. Where it does not, names decide:
    where the model has a table of its own, what stands beside that is not the model's; and an
    optimizer's own state dict, as `optimizer.pt` holds it, is the optimizer's.
    """
    paths, beside = _paths(manifest), manifest.components
    if beside is not None:
        return {n: str(path[0]) if path[0] in beside else "model" for n, path in paths.items()}
    tables = {path[0] for path in paths.values() if len(path) > 1}
    alone = tables >= {"state", "param_groups"}
    table = next((name for name in TABLES if name in tables), None)

    def part_of(path: Sequence[str | int]) -> str:
        if path[0] in PARTS:
            return str(path[0])
        if alone:
            return "optimizer"
        return "model" if table is None or path[0] == table else str(path[0])

    return {name: part_of(path) for name, path in paths.items()}


def name_in_model(path: Sequence[str | int]) -> str:
    """What the model's own state dict calls a tensor of it that lies at this path."""
    nested = len(path) > 1 and path[0] in TABLES
    return ".".join(map(str, path[1:] if nested else path))


def _paths(manifest: Manifest) -> dict[str, Sequence[str | int]]:
    paths: dict[str, Sequence[str | int]] = {n: e.path for n, e in manifest.tensors.items()}
    return paths | {name: entry.path for name, entry in manifest.values.items()}


def _damaged(manifest: Manifest, findings: Sequence[Finding]) -> dict[str, set[str]]:
    """Part to the files that its damage is in. A file that is not whole damages all that it
    holds."""
    parts = parts_of(manifest)
    entries = {(f.entry, f.file) for f in findings if f.concern == "data"}
    files = {finding.file for finding in findings if finding.concern == "file"}
    for name, tensor in manifest.tensors.items() if files else ():
        entries |= {(name, chunk.file) for chunk in tensor.chunks if chunk.file in files}
    for name, value in manifest.values.items():
        if value.file in files:
            entries.add((name, value.file))
    where: dict[str, set[str]] = {}
    for name, file in entries:
        if name in parts:
            where.setdefault(parts[name], set()).add(file)
    return where
