"""Is a checkpoint as it was written? Every byte of it, whoever wrote it, as far as can be known."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from holdfast.catalog.catalog import place, read_checksums, read_manifest
from holdfast.catalog.contents import (
    Advance,
    RecordReader,
    check_containers,
    check_pieces,
    check_record,
    entries_by_record,
    keeps_checksums,
    run,
)
from holdfast.catalog.findings import Finding, Format, VerifyReport, kind_of, usable
from holdfast.catalog.hf_folder import ADAPTER, ADAPTER_CONFIG, CONFIG, read_config
from holdfast.catalog.open_any import format_of, is_folder
from holdfast.catalog.pieces import no_checkpoint
from holdfast.catalog.resumable import misnumbered, why_not_resumable
from holdfast.catalog.steady import LOOKS_MAX, UNREADABLE, fingerprint
from holdfast.catalog.structure import check_coverage, check_structure
from holdfast.errors import DamagedError, FormatError, HoldfastError, NotFoundError
from holdfast.format import safetensors, torchfile
from holdfast.format.archive import read_records, windowed
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import LOCK, MANIFEST, METADATA, step_standing_in
from holdfast.storage.store import ReadStore


@dataclass(frozen=True, slots=True)
class VerifyTarget:
    """What is to be verified, and how far."""

    store: ReadStore
    name: str
    """Folder or file, below the root of the store."""

    quick: bool = False
    """Structure alone: sizes and indexes, no data."""

    advance: Advance = lambda _: None

    @property
    def where(self) -> str:
        return place(self.store, self.name)

    def reader(self, file: str) -> RecordReader:
        key = f"{self.name}/{file}" if file else self.name
        return RecordReader(self.store, key, file or self.name, self.advance)


def verify(target: VerifyTarget) -> VerifyReport:
    """What is wrong with one checkpoint, a folder or a file; `quick` for its structure alone.

    Holds a few windows of data in memory, whatever the size of the checkpoint.

    Raises:
        NotFoundError: there is nothing, or nothing that is a checkpoint.
        FormatError: it is no checkpoint, or one that names code.
        StorageError: the store failed before anything could be said.
    """
    form = format_of(target.store, target.name)
    if form is None:
        raise no_checkpoint(
            target.store,
            target.name,
            hint="`holdfast list FOLDER` shows the steps of a run's checkpoint folder",
        )
    verifiers: dict[Format, Callable[[VerifyTarget], VerifyReport]] = {
        "holdfast": _verify_step,
        "dcp": _verify_step,
        "safetensors": _verify_safetensors,
        "torch": _verify_torch_file,
    }
    report = _steadily(target, verifiers[form])
    number = step_standing_in(target.name.rpartition("/")[2])
    held = Manifest({}, {}, step=report.step, kind=report.kind)
    if number is None:
        return replace(report, format=form)
    wrong = misnumbered(number, held)
    return replace(
        report,
        format=form,
        step=report.step if report.step is not None else number,
        notes=report.notes
        if wrong is None
        else (*report.notes, f"{wrong}; a resume never takes it"),
        why_not=why_not_resumable(number, held),
    )


def _steadily(
    target: VerifyTarget, verifier: Callable[[VerifyTarget], VerifyReport]
) -> VerifyReport:
    """The report of a verifier, which looks again at a checkpoint that was replaced meanwhile."""
    for _ in range(LOOKS_MAX - 1):
        before = fingerprint(target.store, target.name)
        try:
            report = verifier(target)
        except UNREADABLE:
            if fingerprint(target.store, target.name) == before:
                raise
            continue
        if report.good or fingerprint(target.store, target.name) == before:
            return report
    return verifier(target)


def failed(target: VerifyTarget, error: HoldfastError) -> VerifyReport:
    """The report on a checkpoint that cannot even be opened."""
    index = MANIFEST if isinstance(error, DamagedError) else METADATA
    finding = Finding("index", index, error.what)
    number = step_standing_in(target.name.rpartition("/")[2])
    return VerifyReport(
        target.where, None, (finding,), usable="nothing", step=number, why_not=error.what
    )


# ------------------------------------------------------------------------ Holdfast, and stock DCP


def _verify_step(target: VerifyTarget) -> VerifyReport:
    try:
        manifest = read_manifest(target.store, target.name)
    except DamagedError as error:
        return failed(target, error)
    ours = MANIFEST in target.store.list(target.name)
    findings = check_structure(target.store, target.name, manifest)
    findings += check_coverage(manifest)
    refused = {finding.file for finding in findings if finding.concern == "file"}
    if not target.quick:
        if ours:
            files = [file for file in manifest.files if _readable(findings, file)]
            checksums = {}
            for file in files:
                try:
                    checksums[file] = read_checksums(target.store, target.name, manifest, file)
                except HoldfastError as error:
                    findings.append(Finding("file", file, error.what))
            findings += run(check_pieces(manifest, files, checksums, target.reader))
        else:
            findings += run(check_containers(_without(manifest, refused), target.reader))
    known = {MANIFEST, METADATA, *manifest.files}
    return _report(target, manifest, findings, [f for f in _others(target) if f not in known])


def _readable(findings: Sequence[Finding], file: str) -> bool:
    """Whether there is anything to read: a file that is too short or too long is read, so that what
    is whole in it is known."""
    gone = ("is missing", "is a link", "cannot be read")
    return not any(f.file == file and f.what.startswith(gone) for f in findings)


def _without(manifest: Manifest, files: set[str]) -> Manifest:
    """The manifest without what lies in files that are not as they should be."""
    tensors = {
        name: replace(entry, chunks=tuple(c for c in entry.chunks if c.file not in files))
        for name, entry in manifest.tensors.items()
    }
    values = {name: entry for name, entry in manifest.values.items() if entry.file not in files}
    return replace(manifest, tensors=tensors, values=values)


def _others(target: VerifyTarget) -> list[str]:
    return [name for name in target.store.list(target.name) if name != LOCK]


def _report(
    target: VerifyTarget,
    manifest: Manifest,
    findings: Sequence[Finding],
    others: Sequence[str] = (),
) -> VerifyReport:
    notes = [f"`{name}` is not part of the checkpoint" for name in others]
    return VerifyReport(
        target.where,
        None,
        _distinct(findings),
        tuple(notes),
        manifest.step,
        kind_of(manifest),
        len(manifest.tensors) + len(manifest.values),
        manifest.nbytes,
        usable(manifest, findings),
    )


def _distinct(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(dict.fromkeys(findings))


# ------------------------------------------------------------------------------------ safetensors


def _verify_safetensors(target: VerifyTarget) -> VerifyReport:
    names = target.store.list(target.name) if is_folder(target.store, target.name) else [""]
    indexes = [name for name in names if name.endswith(f"{safetensors.SUFFIX}.index.json")]
    findings: list[Finding] = []
    index: dict[str, str] | None = None
    if indexes:
        size = min(
            target.store.size(f"{target.name}/{indexes[0]}"), safetensors.INDEX_BYTES_MAX + 1
        )
        data = target.store.read(f"{target.name}/{indexes[0]}", 0, size)
        index = safetensors.read_index(data, where=f"{target.where}/{indexes[0]}")
    held = [name for name in names if name.endswith(safetensors.SUFFIX) or not name]
    files = held if index is None else sorted(set(index.values()))
    if index is None:
        lacking = safetensors.missing_shards(held)
        findings += [Finding("file", file, "is missing") for file in lacking]
    parts: dict[str, Manifest] = {}
    for file in files:
        try:
            if file and target.store.leads_out(target.name, file):
                findings.append(Finding("file", file, "is a link to a place outside of its folder"))
                continue
            parts[file] = _safetensors_file(target, file)
        except NotFoundError:
            findings.append(Finding("file", file, "is missing"))
        except HoldfastError as error:
            findings.append(Finding("file", file or target.name, error.what))
    for file in (CONFIG, ADAPTER_CONFIG) if names != [""] else ():
        if file in names and (file == CONFIG or files == [ADAPTER]):
            try:
                read_config(target.store, target.name, file)
            except HoldfastError as error:
                findings.append(Finding("file", file, error.what))
    whole = Manifest({n: e for p in parts.values() for n, e in p.tensors.items()}, {})
    if not findings:
        try:
            whole = safetensors.joined(parts, index, where=target.where)
        except FormatError as error:
            findings.append(Finding("index", indexes[0] if indexes else "", error.what))
    report = _report(target, whole, findings)
    notes = [
        f"`{file}` is not in the index, and does not count" for file in held if file not in files
    ]
    if not target.quick:
        notes.append(
            "safetensors keeps no checksums: headers and sizes were checked, data cannot be"
        )
    return replace(report, notes=tuple(notes))


def _safetensors_file(target: VerifyTarget, file: str) -> Manifest:
    reader = target.reader(file)
    nbytes = target.store.size(reader.key)
    where = f"{target.where}/{file}" if file else target.where
    return safetensors.read_file(reader.fetch, nbytes, file=reader.file, where=where)


# -------------------------------------------------------------------------------------- .pt files


def _verify_torch_file(target: VerifyTarget) -> VerifyReport:
    reader = target.reader("")
    nbytes = target.store.size(reader.key)
    read = partial(torchfile.read_file, reader.fetch, nbytes, file=reader.file, where=target.where)
    if reader.fetch(0, 1) == b"\x80":
        read()
    try:
        records = read_records(windowed(reader.fetch, Span(0, nbytes)), nbytes)
    except (ValueError, LookupError, struct.error) as error:
        what = f"is not a whole file of torch.save: {error}"
        finding = Finding("file", reader.file, what)
        return VerifyReport(target.where, "torch", (finding,), nbytes=nbytes, usable="nothing")
    kept = keeps_checksums(records)
    findings: list[Finding] = []
    for name in ("data.pkl", "byteorder"):
        if kept and name in records:
            findings += check_record(reader, records, name, 0, "")
    if findings:
        return VerifyReport(target.where, "torch", tuple(findings), nbytes=nbytes, usable="nothing")
    manifest = read().manifest
    if kept and not target.quick:
        entries = entries_by_record(manifest, records)
        findings += run(
            partial(check_record, reader, records, name, 0, entries.get(name, ""))
            for name in records
        )
    report = _report(target, manifest, findings)
    if not kept:
        report = replace(report, notes=("it was written without checksums: data is not checked",))
    return report
