"""Verifies a checkpoint of any format: every byte, as far as the format has checksums."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from holdfast.catalog.catalog import check_inside, location, read_checksums, read_manifest
from holdfast.catalog.contents import (
    Advance,
    RecordReader,
    check_containers,
    check_files,
    check_record,
    entries_by_record,
    has_checksums,
    run,
)
from holdfast.catalog.findings import (
    Finding,
    Format,
    VerifyReport,
    finding_of,
    has_wrong_size,
    is_unreadable,
    kind_of,
    misnumbered,
    usable,
    why_not_resumable,
)
from holdfast.catalog.hf_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    Weights,
    open_hf_folder,
    read_config,
    weights_in,
)
from holdfast.catalog.nested import checkpoint_in
from holdfast.catalog.open_any import checked_format, is_folder, notes_on
from holdfast.catalog.replaceable import not_sealed
from holdfast.catalog.seal import check_seal, is_sealed, read_seal
from holdfast.catalog.steady import read_steadily
from holdfast.catalog.structure import check_coverage, check_structure
from holdfast.catalog.zero_folder import open_zero_folder
from holdfast.errors import DamagedError, FormatError, HoldfastError, NotFoundError, StorageError
from holdfast.format import safetensors, torchfile
from holdfast.format.archive import read_records, windowed
from holdfast.format.manifest import Manifest, Span
from holdfast.format.names import (
    INDEX_FILES,
    LOCK,
    MANIFEST,
    METADATA,
    ROWS,
    number_of,
    step_of_folder,
)
from holdfast.format.seal import SEAL
from holdfast.format.zero import ZERO_MODEL, ZERO_OPTIMIZER
from holdfast.storage.store import ReadStore


@dataclass(frozen=True, slots=True)
class VerifyTarget:
    """A checkpoint to verify, and options."""

    store: ReadStore
    name: str
    """Folder or file below the root of the store."""

    quick: bool = False
    """Whether to check sizes and indices only, not data."""

    advance: Advance = lambda _: None

    @property
    def where(self) -> str:
        return location(self.store, self.name)

    def reader(self, file: str) -> RecordReader:
        key = f"{self.name}/{file}" if file else self.name
        return RecordReader(self.store, key, file or self.name, self.advance)


def verify(target: VerifyTarget) -> VerifyReport:
    """Verify one checkpoint, a folder or a file.

    Holds a few windows of data in memory, whatever the size of the checkpoint.

    Raises:
        NotFoundError: there is no such folder or file, or it is no checkpoint.
        FormatError: the checkpoint is malformed, or refers to code.
        StorageError: an index cannot be read, so nothing can be reported.
    """
    sealed = is_folder(target.store, target.name) and is_sealed(target.store, target.name)
    if not sealed:
        target = _with_name(target, checkpoint_in(target.store, target.name))
    form: Format = "sealed" if sealed else checked_format(target.store, target.name)
    verifiers = {
        "safetensors": _verify_safetensors,
        "bin": _verify_torch_folder,
        "zero": _verify_torch_folder,
        "torch": _verify_torch_file,
        "sealed": _verify_sealed,
    }
    verifier = verifiers.get(form, _verify_step)
    report = read_steadily(
        target.store,
        target.name,
        lambda folder, _: verifier(_with_name(target, folder)),
        is_good=lambda report: report.good,
    )
    step = step_of_folder(target.name.rpartition("/")[2])
    if step is None or form == "sealed":
        return replace(report, format=form)
    manifest = Manifest({}, {}, step=report.step, kind=report.kind)
    wrong = misnumbered(step, manifest)
    notes = () if wrong is None else (f"{wrong}; a resume never takes it",)
    return replace(
        report,
        format=form,
        step=step if report.step is None else report.step,
        notes=(*report.notes, *notes),
        why_not=why_not_resumable(step, manifest),
    )


def _with_name(target: VerifyTarget, name: str) -> VerifyTarget:
    return target if name == target.name else replace(target, name=name)


def failed(target: VerifyTarget, error: HoldfastError) -> VerifyReport:
    """Return the report on a checkpoint whose verification raised `error`: an index cannot be read,
    or is damaged."""
    file = _index_in(target) if error.file is None else error.file.rpartition("/")[2]
    finding = Finding("index", file, error.what)
    if is_unreadable(error):
        finding = finding_of("index", file, error)
    step = step_of_folder(target.name.rpartition("/")[2])
    return VerifyReport(
        target.where, None, (finding,), usable="nothing", step=step, why_not=error.what
    )


def _index_in(target: VerifyTarget) -> str:
    """Return the name of the index that a reader of the checkpoint opens first."""
    with suppress(HoldfastError):
        names = target.store.list(target.name)
        if METADATA in names and MANIFEST not in names:
            return METADATA
    return MANIFEST


# --------------------------------------------------------------------------------- sealed folders


def _verify_sealed(target: VerifyTarget) -> VerifyReport:
    store, name = target.store, target.name
    try:
        seal = read_seal(store, name)
    except DamagedError as error:
        finding = Finding("index", SEAL, error.what)
        return VerifyReport(
            target.where, "sealed", (finding,), usable="nothing that can be checked"
        )
    findings = check_seal(store, name, seal, quick=target.quick, advance=target.advance)
    damaged = {finding.file for finding in findings}
    return VerifyReport(
        where=target.where,
        format="sealed",
        findings=tuple(findings),
        notes=tuple(f"`{path}` was added after the seal" for path in not_sealed(store, name)),
        step=number_of(name.rpartition("/")[2]),
        kind="full",
        num_entries=len(seal.files),
        nbytes=seal.nbytes,
        usable=f"{len(seal.files) - len(damaged)} of {len(seal.files)} files are whole",
    )


# ------------------------------------------------------------------------ Holdfast, and stock DCP


def _verify_step(target: VerifyTarget) -> VerifyReport:
    names = target.store.list(target.name)
    try:
        manifest = read_manifest(target.store, target.name)
    except DamagedError as error:
        return failed(target, error)
    except FormatError as error:
        if all(_is_plain(target.store, f"{target.name}/{f}") for f in INDEX_FILES if f in names):
            raise
        return failed(target, error)
    findings = check_structure(target.store, target.name, manifest)
    has_rows = not any(finding.file == ROWS for finding in findings)
    try:
        findings += check_coverage(manifest) if has_rows else ()
    except FormatError as error:
        findings.append(Finding("index", ROWS, error.what))
        has_rows = False
    if not has_rows:
        # Only `index.bin` tells where the entries are, so their bytes cannot be checked.
        report = _report(target, manifest, ())
        return replace(report, findings=tuple(findings), usable="nothing")
    if not target.quick and MANIFEST in names:
        checksums = {}
        on_files = [f for f in findings if f.concern == "file" and not f.entry]
        unreadable = {finding.file for finding in on_files if not has_wrong_size(finding)}
        files = [file for file in manifest.files if file not in unreadable]
        for file in files:
            try:
                checksums[file] = read_checksums(target.store, target.name, manifest, file)
            except StorageError as error:
                findings.append(finding_of("file", file, error))
            except HoldfastError as error:
                findings.append(Finding("file", file, error.what))
        findings += run(check_files(manifest, files, checksums, target.reader))
    elif not target.quick:
        refused = {finding.file for finding in findings if finding.concern == "file"}
        findings += run(check_containers(manifest, refused, target.reader))
    known = {MANIFEST, METADATA, LOCK, *manifest.files}
    if manifest.rows is not None:
        known.add(ROWS)
    notes = [f"`{name}` is not part of the checkpoint" for name in names if name not in known]
    return _report(target, manifest, findings, notes)


def _is_plain(store: ReadStore, key: str) -> bool:
    """Return whether a key is that of a file, and not of a pipe, socket or device."""
    try:
        store.size(key)
    except FormatError:
        return False
    except HoldfastError:
        return True
    return True


def _report(
    target: VerifyTarget,
    manifest: Manifest,
    findings: Sequence[Finding],
    notes: Sequence[str] = (),
) -> VerifyReport:
    return VerifyReport(
        where=target.where,
        format=None,
        findings=tuple(dict.fromkeys(findings)),
        notes=tuple(notes),
        step=manifest.step,
        kind=kind_of(manifest),
        num_entries=len(manifest.tensors) + len(manifest.values),
        nbytes=manifest.nbytes,
        usable=usable(manifest, findings),
    )


# ------------------------------------------------------------------------------------ safetensors


def _verify_safetensors(target: VerifyTarget) -> VerifyReport:
    folder = is_folder(target.store, target.name)
    names = target.store.list(target.name) if folder else [""]
    chosen = weights_in(target.store, target.name) if folder else Weights(("",), "", ())
    files = chosen.files
    findings: list[Finding] = []
    if chosen.file_of is None:
        shards = safetensors.missing_shards(files)
        findings += [Finding("file", file, "is missing") for file in shards]
    manifests: dict[str, Manifest] = {}
    for file in files:
        try:
            if file and target.store.leads_out(target.name, file):
                findings.append(Finding("file", file, "is a link to a place outside of its folder"))
                continue
            reader = target.reader(file)
            where = f"{target.where}/{file}" if file else target.where
            manifests[file] = safetensors.read_file(
                reader.fetch, target.store.size(reader.key), file=reader.file, where=where
            )
        except StorageError as error:
            findings.append(finding_of("file", file or target.name, error))
        except NotFoundError:
            findings.append(Finding("file", file, "is missing"))
        except HoldfastError as error:
            findings.append(Finding("file", file or target.name, error.what))
    for file in (CONFIG, ADAPTER_CONFIG) if folder else ():
        if file in names and (file == CONFIG or chosen.is_adapter):
            try:
                read_config(target.store, target.name, file)
            except StorageError as error:
                findings.append(finding_of("file", file, error))
            except HoldfastError as error:
                findings.append(Finding("file", file, error.what))
    manifest = Manifest({n: e for m in manifests.values() for n, e in m.tensors.items()}, {})
    if not findings:
        try:
            manifest = safetensors.joined(manifests, chosen.file_of, where=target.where)
        except FormatError as error:
            findings.append(Finding("index", chosen.index, error.what))
    notes = [*chosen.notes]
    if not target.quick:
        notes.append(
            "safetensors keeps no checksums: headers and sizes were checked, data cannot be"
        )
    return _report(target, manifest, findings, notes)


# -------------------------------------------------------------------------------------- .pt files


def _verify_torch_file(target: VerifyTarget) -> VerifyReport:
    checked = _check_torch_file(target, "")
    report = _report(target, checked.manifest, checked.findings, checked.notes)
    nbytes = target.store.size(target.name)
    return report if checked.is_read else replace(report, nbytes=nbytes, usable="nothing")


def _verify_torch_folder(target: VerifyTarget) -> VerifyReport:
    """Verify a folder of `.bin` weights, or of DeepSpeed's ZeRO. Both consist of files of
    `torch.save`."""
    store, name = target.store, target.name
    names = store.list(name)
    chosen = weights_in(store, name)
    is_zero = any(map(ZERO_OPTIMIZER.fullmatch, names))
    files = [*chosen.files]
    if is_zero:
        files = [f for f in names if ZERO_OPTIMIZER.fullmatch(f) or ZERO_MODEL.fullmatch(f)]
    findings: list[Finding] = []
    notes: list[str] = [] if is_zero else [*chosen.notes]
    # Without an index, the file names tell which shards are missing.
    unnamed = [] if chosen.index else safetensors.missing_shards(files)
    for file in [*files, *unnamed]:
        if file not in names:
            findings.append(Finding("file", file, "is missing"))
            continue
        check_inside(store, name, file)
        checked = _check_torch_file(target, file)
        findings += checked.findings
        notes += (f"`{file}`: {note}" for note in checked.notes)
    manifest = Manifest({}, {})
    if not findings:
        # Opening the whole folder raises errors about files that contradict each other.
        if is_zero:
            manifest, _ = open_zero_folder(store, name)
        else:
            manifest = open_hf_folder(store, name).manifest
    return _report(target, manifest, findings, notes)


@dataclass(frozen=True, slots=True)
class _TorchFileCheck:
    """Result of checking one file of `torch.save`."""

    manifest: Manifest
    findings: Sequence[Finding]
    notes: Sequence[str] = ()
    is_read: bool = True
    """Whether the file's pickle could be read."""


def _check_torch_file(target: VerifyTarget, file: str) -> _TorchFileCheck:
    """Check the `torch.save` file `file` in the target's folder. If `file` is empty, the target
    itself is the file."""
    reader = target.reader(file)
    nbytes = target.store.size(reader.key)
    where = f"{target.where}/{file}".rstrip("/")
    names = torchfile.check_kind(reader.fetch, nbytes, where=where)
    read = partial(torchfile.read_file, reader.fetch, nbytes, file=reader.file, where=where)
    nothing = Manifest({}, {})
    if reader.fetch(0, 1) == b"\x80":
        content = read()
        return _TorchFileCheck(content.manifest, (), (*notes_on(content), _UNCHECKED))
    try:
        records = read_records(windowed(reader.fetch, Span(0, nbytes)), nbytes)
    except (ValueError, LookupError, struct.error) as error:
        what = f"is not a whole file of torch.save: {error}"
        if names is None:
            what = f"is {torchfile.CUT_SHORT}"
        return _TorchFileCheck(nothing, [Finding("file", reader.file, what)], is_read=False)
    findings: list[Finding] = []
    checked = has_checksums(records)
    for name in ("data.pkl", "byteorder"):
        if checked and name in records:
            findings += check_record(reader, records, name, 0, "")
    if findings:
        return _TorchFileCheck(nothing, findings, is_read=False)
    content = read()
    if checked and not target.quick:
        entries = entries_by_record(content.manifest, records)
        findings += run(
            partial(check_record, reader, records, name, 0, entries.get(name, ""))
            for name in records
        )
    notes = () if checked else (_UNCHECKED,)
    return _TorchFileCheck(content.manifest, findings, (*notes_on(content), *notes))


_UNCHECKED = "it was written without checksums: data is not checked"
