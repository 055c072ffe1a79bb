"""Findings: problems of a checkpoint, its usable parts, and whether a run can resume from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.errors import HoldfastError, NotFoundError, StorageError
from holdfast.format.components import COMPONENTS, MODEL, MODEL_KEYS, OPTIMIZER
from holdfast.format.manifest import Kind, Manifest, NewerVersionError, kind_with

Format = Literal["holdfast", "dcp", "safetensors", "torch", "bin", "zero", "sealed"]

Concern = Literal["index", "file", "data", "frame"]
"""Scope of a finding. `index`, `file`: the checkpoint does not load. `data`: the entry does not
load. `frame`: bytes around an entry are wrong, which only stock torch reads."""

FORMATS: Mapping[Format, str] = {
    "holdfast": "checkpoint of Holdfast",
    "dcp": "checkpoint of stock torch.distributed.checkpoint",
    "safetensors": "safetensors",
    "torch": "file of torch.save",
    "bin": "folder of files of torch.save",
    "zero": "folder of DeepSpeed's ZeRO",
    "sealed": "sealed folder",
}
"""Names of the formats, for messages."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between a checkpoint and what was written."""

    concern: Concern
    file: str
    """Name of the file in the checkpoint's folder."""

    what: str
    """Description of the problem, which continues a sentence after the name of the entry or of the
    file, such as `is missing`."""

    entry: str = ""
    """Tensor or value; empty if the finding is about the file."""

    block: int | None = None
    """Index of the damaged block of the tensor; None if the finding is not about one block."""

    unreadable: bool = False
    """Whether the file cannot be read now, so that it may be undamaged: rights are missing, the
    disk or the mount fails, or only a newer Holdfast reads the format."""

    hint: str | None = None
    """Next step, if the file cannot be read."""

    def __str__(self) -> str:
        entry = f" `{self.entry}`" if self.entry else ""
        entry += f" block {self.block}" if self.block is not None else ""
        # "`FILE` is missing" has no colon, "`FILE` `ENTRY`: ..." and "`FILE`: `RECORD` ..." have.
        colon = ":" if entry or self.what.startswith("`") else ""
        return f"`{self.file}`{entry}{colon} {self.what}"


def is_unreadable(error: HoldfastError) -> bool:
    """Return whether an error says only that a file cannot be read now, and not that the file is
    damaged."""
    return isinstance(error, StorageError | NewerVersionError)


def finding_of(concern: Concern, file: str, error: HoldfastError, entry: str = "") -> Finding:
    """Return the finding for an `error` that was raised while `file` was read."""
    if isinstance(error, NotFoundError):
        return Finding(concern, file, "is missing", entry)
    what = f"cannot be read: {error.what}"
    if not is_unreadable(error):
        return Finding(concern, file, what, entry)
    return Finding(concern, file, what, entry, unreadable=True, hint=error.hint)


def unreadable_among(findings: Sequence[Finding]) -> Finding | None:
    """Return the first finding about a file that cannot be read now; None if there is none."""
    return next((finding for finding in findings if finding.unreadable), None)


def raise_unreadable(where: str, findings: Sequence[Finding]) -> None:
    """Raise a StorageError if a file of the checkpoint `where` cannot be read now: then no other
    finding is certain."""
    if unreadable := unreadable_among(findings):
        raise StorageError(f"`{where}`: {unreadable}", hint=unreadable.hint)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of verifying one checkpoint."""

    where: str
    format: Format | None
    """Format of the checkpoint; None if no index can be read."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """Remarks that are not findings: data without checksums, files that are not part of the
    checkpoint."""

    step: int | None = None
    kind: Kind | None = None
    num_entries: int = 0
    nbytes: int = 0
    """Bytes of all data files."""

    usable: str = "everything"
    """Parts that can still be used, for messages."""

    why_not: str | None = None
    """Reason why no run could resume from the checkpoint even without damage; None if a run
    could."""

    @property
    def good(self) -> bool:
        return not self.findings

    @property
    def damaged(self) -> bool:
        """Whether bytes were read that are not those that were written, or files are missing or
        have other sizes. False if files could only not be read."""
        return not all(finding.unreadable for finding in self.findings)

    @property
    def loads(self) -> bool:
        """Whether Holdfast can load every entry of the checkpoint."""
        return all(finding.concern == "frame" for finding in self.findings)


MODEL_IS_WHOLE = "model is whole"
"""Beginning of `VerifyReport.usable` if other parts are damaged, but the model is not."""

NAMED_MAX = 3
"""Most entries or files that a message names."""

_NUMBERS = re.compile(r"\b[0-9a-f]{8,}\b|[0-9]+", re.ASCII)


def summary_of(findings: Sequence[Finding]) -> str:
    """Return one line about all findings: the first line of `by_cause`, and the number of its other
    lines."""
    first, *others = by_cause(findings)
    return first + (f", and {len(others)} more" if others else "")


def by_cause(findings: Sequence[Finding]) -> list[str]:
    """Return one line for each cause, with the number of findings that share it.

    Findings about one file have the same cause if their texts differ only in numbers. A wrong file
    size is the cause of all findings about that file.
    """
    cut = {f.file for f in findings if f.concern == "file" and not f.entry and has_wrong_size(f)}
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        if finding.file in cut:
            cause: tuple[str, ...] = (finding.file,)
        else:
            cause = finding.concern, finding.file, _NUMBERS.sub("#", finding.what)
        groups.setdefault(cause, []).append(finding)
    return [_line(group) for group in groups.values()]


def has_wrong_size(finding: Finding) -> bool:
    """Return whether a finding is about a file that has another size than was written. Undamaged
    entries of such a file can be read."""
    return finding.what.startswith("has ") and finding.what.endswith(" were written")


def _line(group: Sequence[Finding]) -> str:
    first, *others = group
    if first.concern == "file" and first.entry and others:
        # For a missing file, name all entries in one line instead of one line for each entry.
        entries = list(dict.fromkeys(finding.entry for finding in group))
        return f"`{first.file}` {first.what}: it holds {named(entries)}"
    entries = list(dict.fromkeys(f.entry for f in others if f.entry and f.entry != first.entry))
    if not others:
        return str(first)
    if not entries:
        return f"{first}; and so {len(others)} more of its {'blocks' if first.entry else 'places'}"
    unnamed = sum(not finding.entry for finding in others)
    elsewhere = f" and {unnamed} more of its places" if unnamed else ""
    return f"{first}; and so {named(entries)}{elsewhere}"


def named(names: Sequence[str]) -> str:
    """Return text for a message: up to `NAMED_MAX` of the names, and the number of the others."""
    first = ", ".join(f"`{name}`" for name in names[:NAMED_MAX])
    more = len(names) - NAMED_MAX
    return first + (f" and {more} more" if more > 0 else "")


def usable(manifest: Manifest, findings: Sequence[Finding]) -> str:
    """Describe the parts of a checkpoint that can be used despite these findings, for messages."""
    if not findings:
        return "everything"
    if all(finding.concern == "frame" for finding in findings):
        return "everything, by Holdfast; stock torch may fail on what is named above"
    damaged = _damaged_files(manifest, [f for f in findings if not f.unreadable])
    unread = _damaged_files(manifest, [f for f in findings if f.unreadable])
    without = sorted(damaged.keys() | unread.keys())
    whole = {*components_of(manifest).values()} - {*without}
    lines = [f"{name} is whole" for name in sorted(whole, key=lambda name: (name != MODEL, name))]
    lines += [
        f"{name} {what} {', '.join(sorted(files[name]))}"
        for name in without
        for what, files in (("is damaged in", damaged), ("cannot be read in", unread))
        if name in files
    ]
    refused = [finding for finding in findings if finding.concern in ("index", "file")]
    if refused:
        files = ", ".join(sorted({finding.file for finding in refused}))
        unreadable = all(finding.unreadable for finding in refused)
        then = "cannot be read" if unreadable else "is not as it was written"
        lines.append(f"a load refuses this checkpoint as long as {files} {then}")
    elif MODEL in whole:
        lines.append(f"a run can resume from it without {', '.join(without)}")
    return "; ".join(lines)


def kind_of(manifest: Manifest) -> Kind:
    """Return the kind of a checkpoint, `full` or `model`. If the manifest does not state it, the
    entries decide."""
    if manifest.kind is not None:
        return manifest.kind
    return kind_with(entry.path[0] for entry in manifest.tensors.values())


def why_not_resumable(step: int, manifest: Manifest) -> str | None:
    """Return the reason why no run can resume from the undamaged checkpoint in the folder of
    `step`; None if a run can.

    `list`, `verify`, `doctor`, `prune`, retention and resuming all call this function, so that they
    never contradict each other.
    """
    if wrong := misnumbered(step, manifest):
        return wrong
    if kind_of(manifest) != "full" and step != 0:
        return "it holds the model alone, and cannot be resumed from"
    return None


def misnumbered(step: int, manifest: Manifest) -> str | None:
    """Return the problem of a checkpoint whose own step is not the number of its folder; None if
    both agree, or if the manifest has no step, as in stock DCP.

    A checkpoint with this problem is a copy that a user made. Retention neither counts nor deletes
    it.
    """
    if manifest.step is None or manifest.step == step:
        return None
    return f"it holds step {manifest.step}: it is a copy of that step, or was renamed"


def components_of(manifest: Manifest) -> dict[str, str]:
    """Return the component of each entry, by the name of the entry.

    A manifest of Holdfast lists the components. In other formats, the first key of an entry's path
    decides. If a key such as `model` marks the model, all other first keys are other components.
    Without such a key, entries belong to the model unless their first key is a component such as
    `optimizer`. If the first keys include `state` and `param_groups`, as in `optimizer.pt`, the
    entries belong to an optimizer.
    """
    paths: dict[str, Sequence[str | int]] = {n: e.path for n, e in manifest.tensors.items()}
    paths |= {name: entry.path for name, entry in manifest.values.items()}
    components = manifest.components
    if components is not None:
        return {n: str(path[0]) if path[0] in components else MODEL for n, path in paths.items()}
    first_keys = {path[0] for path in paths.values() if len(path) > 1}
    is_optimizer = first_keys >= {"state", "param_groups"}
    model_key = next((name for name in MODEL_KEYS if name in first_keys), None)

    def component_of(path: Sequence[str | int]) -> str:
        if path[0] in COMPONENTS:
            return str(path[0])
        if is_optimizer:
            return OPTIMIZER
        return MODEL if model_key is None or path[0] == model_key else str(path[0])

    return {name: component_of(path) for name, path in paths.items()}


def name_in_model(path: Sequence[str | int]) -> str:
    """Return the name that the model's tensor at `path` has in the model's own state dict."""
    nested = len(path) > 1 and path[0] in MODEL_KEYS
    return ".".join(map(str, path[1:] if nested else path))


def _damaged_files(manifest: Manifest, findings: Sequence[Finding]) -> dict[str, set[str]]:
    """Return the names of the damaged files of each damaged component. A finding whose concern is
    `file` damages all entries in the file."""
    damaged = {(f.entry, f.file) for f in findings if f.concern == "data"}
    files = {finding.file for finding in findings if finding.concern == "file"}
    for name, tensor in manifest.tensors.items() if files else ():
        damaged |= {(name, chunk.file) for chunk in tensor.chunks if chunk.file in files}
    damaged |= {(name, v.file) for name, v in manifest.values.items() if v.file in files}
    components = components_of(manifest)
    by_component: dict[str, set[str]] = {}
    for name, file in damaged:
        if name in components:
            by_component.setdefault(components[name], set()).add(file)
    return by_component
