"""`verify` finds every damage to a checkpoint of Holdfast, and all detectable damage to other
formats."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from checkpoints import (
    DAMAGES,
    STEP,
    append,
    delete,
    flip,
    save_safetensors,
    save_step,
    save_stock,
    save_torch,
    truncate,
    zero,
)
from extent import every
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.findings import VerifyReport
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.errors import DamagedError, HoldfastError, NotFoundError
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Manifest, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.manager.resume import newest_resumable
from holdfast.storage.local import LocalStore
from manifest_bytes import encode_metadata

NUM_PLACES = 300


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with one checkpoint of every kind. Tests damage them in place, and repair
    them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_step(folder)
    save_stock(folder / "stock")
    save_safetensors(folder / "hf")
    save_torch(folder / "one.pt")
    return folder


def checked(path: Path, *, quick: bool = False) -> VerifyReport:
    return verify(VerifyTarget(LocalStore(path.parent), path.name, quick))


@contextmanager
def changed(path: Path) -> Iterator[bytearray]:
    """Give a function that overwrites a file with the bytes it gets; restore the file at the
    end."""
    whole = path.read_bytes()
    try:
        yield bytearray(whole)
    finally:
        path.write_bytes(whole)


def tensor_at(manifest: Manifest, file: str, at: int) -> tuple[str, int] | None:
    """Return the tensor and the block that contain a byte of a file."""
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            nbytes = chunk.region.num_elements * dtype_of(entry.dtype).itemsize
            start = chunk.data_offset or 0
            if chunk.file == file and start <= at < start + nbytes:
                return name, (at - start) // BLOCK_BYTES
    return None


@pytest.mark.parametrize("name", [f"step-{STEP}", "stock", "hf", "one.pt"])
@pytest.mark.parametrize("quick", [False, True])
def test_an_undamaged_checkpoint_of_every_kind_passes(home: Path, name: str, quick: bool) -> None:
    """G3. Method: checkpoints written by Holdfast (two ranks), stock DCP, safetensors and
    torch.save."""
    report = checked(home / name, quick=quick)
    assert report.findings == ()
    assert report.usable == "everything"
    assert report.num_entries > 3


def test_damage_anywhere_in_a_step_is_found_and_the_tensor_named(home: Path) -> None:
    """G3. Method: 300 seeded positions in all files of a step, the indices included, each flipped,
    zeroed, truncated, extended or shortened. A flip inside a tensor is reported with the name of
    the tensor and the number of the block."""
    random = Random(11)
    step = home / f"step-{STEP}"
    manifest = open_manifest(LocalStore(home), step.name)
    files = sorted(path for path in step.iterdir() if path.is_file())
    assert len(files) == 4
    for place in range(NUM_PLACES):
        path, damage = files[place % 4], DAMAGES[place // 4 % 5]
        with changed(path) as data:
            at = random.randrange(len(data))
            damage(data, at, random)
            path.write_bytes(data)
            report = checked(step)
        assert not report.good, f"{damage.__name__} at {at} of {path.name}"
        inside = tensor_at(manifest, path.name, at)
        if inside and damage in (flip, zero):
            names = {(f.entry, f.block) for f in report.findings}
            assert inside in names or (inside[0].replace("tied", "tied_too"), inside[1]) in names
    assert checked(step).good


def test_every_single_byte_around_the_data_of_a_tensor_counts(tmp_path: Path) -> None:
    """G3. Method: change each byte of both files of a step that is outside of the data of large
    tensors: stock torch reads these frames. By default, every third byte."""
    import torch

    import holdfast

    holdfast.save(tmp_path / "one", {"w": torch.tensor([7.0, 8.0]), "n": 3})
    path = tmp_path / "one/__0_0.distcp"
    store = LocalStore(tmp_path)
    with changed(path) as data:
        for at in every(3, range(len(data))):
            data[at] ^= 0x55
            path.write_bytes(data)
            assert not verify(VerifyTarget(store, "one")).good, f"byte {at}"
            data[at] ^= 0x55
    assert verify(VerifyTarget(store, "one")).good


def test_a_deleted_file_of_a_step_is_found_whichever_it_is(home: Path) -> None:
    """G3, G4: without `manifest.json` a step would be taken for a stock one, without checksums.
    Method: each file of a step removed; `verify` and a load refuse it."""
    step = home / f"step-{STEP}"
    for path in sorted(step.iterdir()):
        with changed(path):
            path.unlink()
            for quick in (False, True):
                report = checked(step, quick=quick)
                assert any(path.name in f.file or path.name in f.what for f in report.findings)
            with pytest.raises(DamagedError):
                open_manifest(LocalStore(home), step.name)
    assert checked(step).good


def test_what_is_usable_is_said(home: Path) -> None:
    """G4. Method: a changed byte of an optimizer tensor, a changed byte of a frame, and a truncated
    file."""
    step = home / f"step-{STEP}"
    manifest = open_manifest(LocalStore(home), step.name)
    moment = manifest.tensors["optimizer.moment"].chunks[0]
    path = step / moment.file
    with changed(path) as data:
        flip(data, moment.data_offset or 0, Random(1))
        path.write_bytes(data)
        report = checked(step)
        assert "model is whole" in report.usable
        assert f"optimizer is damaged in {moment.file}" in report.usable
        assert "a run can resume from it without" in report.usable
        assert not report.loads
        assert checked(step, quick=True).good, "structure alone does not read data"
    with changed(path) as data:
        data[moment.item.offset + 10] ^= 1
        path.write_bytes(data)
        report = checked(step)
        assert report.usable.startswith("everything, by Holdfast")
        assert report.loads
    with changed(path) as data:
        path.write_bytes(data[:-1])
        assert "a load refuses this checkpoint" in checked(step, quick=True).usable


def test_a_file_that_nobody_wrote_is_noted_and_is_no_damage(home: Path) -> None:
    """G3. Method: a file of the user in the folder of the step."""
    extra = home / f"step-{STEP}/notes.txt"
    extra.write_text("mine")
    try:
        report = checked(extra.parent)
        assert report.good
        assert report.notes == ("`notes.txt` is not part of the checkpoint",)
    finally:
        extra.unlink()


def record_spans(data: bytes, position: int = 0) -> list[tuple[str, int, int]]:
    """Return the name, the first byte and the end of each record of an archive, by Python's
    zipfile."""
    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name_bytes = int.from_bytes(data[info.header_offset + 26 :][:2], "little")
            extra_bytes = int.from_bytes(data[info.header_offset + 28 :][:2], "little")
            start = info.header_offset + 30 + name_bytes + extra_bytes
            stop = position + start + info.file_size
            found.append((info.filename.partition("/")[2], position + start, stop))
    return [one for one in found if one[2] > one[1]]


def test_damage_to_any_record_of_a_stock_checkpoint_is_found_and_the_entry_named(
    home: Path,
) -> None:
    """G3: stock DCP writes a CRC-32 and never reads it. Method: 120 seeded positions inside the
    records of every item, flipped or zeroed; the file truncated, extended, shortened, deleted."""
    random = Random(12)
    path = home / "stock/__0_0.distcp"
    manifest = open_manifest(LocalStore(home), "stock")
    items = [(name, c.item) for name, e in manifest.tensors.items() for c in e.chunks]
    items += [(name, value.item) for name, value in manifest.values.items()]
    whole = path.read_bytes()
    spans = [
        (name, *span)
        for name, item in items
        for span in record_spans(whole[item.offset : item.stop], item.offset)
    ]
    for place in range(120):
        name, record, start, stop = spans[place % len(spans)]
        with changed(path) as data:
            at = random.randrange(start, stop)
            (flip, zero)[place % 2](data, at, random)
            path.write_bytes(data)
            report = checked(home / "stock")
        found = {finding.entry for finding in report.findings}
        assert name in found, f"byte {at}, `{record}` of `{name}`"
    for damage in (truncate, append, delete):
        with changed(path) as data:
            damage(data, random.randrange(len(data)), random)
            path.write_bytes(data)
            # A stock index has no file sizes: bytes after the last item cannot be checked.
            assert damage is append or not checked(home / "stock").good
    with changed(path):
        path.unlink()
        assert "is missing" in str(checked(home / "stock", quick=True).findings[0])
    assert checked(home / "stock").good


def test_damage_to_any_record_of_a_pt_file_is_found_and_the_tensor_named(home: Path) -> None:
    """G3. Method: 80 seeded positions inside the records, flipped or zeroed; a tensor is reported
    by its name. The file is truncated, extended and shortened at random positions."""
    random = Random(13)
    path = home / "one.pt"
    named = {"data/0": "model.large", "data/1": "model.half", "data/2": "model.tied"}
    spans = record_spans(path.read_bytes())
    for place in range(80):
        record, start, stop = spans[place % len(spans)]
        with changed(path) as data:
            at = random.randrange(start, stop)
            (flip, zero)[place % 2](data, at, random)
            path.write_bytes(data)
            report = checked(path)
        assert not report.good, f"byte {at}, `{record}`"
        assert any(named.get(record, "") in finding.entry for finding in report.findings)
    for damage in (truncate, append, delete):
        for _ in range(10):
            with changed(path) as data:
                damage(data, random.randrange(len(data)), random)
                path.write_bytes(data)
                assert not checked(path).good, damage.__name__
    assert checked(path).good


def test_damage_to_the_headers_of_safetensors_is_found(home: Path) -> None:
    """G3: safetensors has no checksums, so that only headers, offsets and sizes are checked.
    Method: one bit of every byte of each header; then the file truncated, extended, shortened and
    deleted. The report says that the data was not checked."""
    random = Random(14)
    for path in sorted((home / "hf").glob("*.safetensors")):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for at in range(header):
            with changed(path) as data:
                flip(data, at, random)
                path.write_bytes(data)
                assert not checked(home / "hf").good, f"byte {at} of {path.name}"
        for damage in (truncate, append, delete):
            with changed(path) as data:
                damage(data, random.randrange(len(data)), random)
                path.write_bytes(data)
                assert not checked(home / "hf").good, damage.__name__
        with changed(path):
            path.unlink()
            assert "is missing" in str(checked(home / "hf").findings[0])
    assert "data can" in checked(home / "hf").notes[0]


def test_the_step_that_a_resume_takes_is_the_newest_that_passes(tmp_path: Path) -> None:
    """G4. Method: three steps, the newest cut short."""
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    newest = tmp_path / "step-3/__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert not checked(newest.parent, quick=True).loads
    found, refused = newest_resumable(Catalog(LocalStore(tmp_path)), None)
    assert found is not None
    assert found.step == 2
    assert "`__0_0.distcp`" in refused[0]


def test_nothing_there_and_nothing_that_is_a_checkpoint_are_errors_of_their_own(
    tmp_path: Path,
) -> None:
    """Method: no such path, an empty folder, a text file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello, this is text")
    for name in ("missing", "empty", "text.txt"):
        with pytest.raises(NotFoundError):
            checked(tmp_path / name)


def test_memory_stays_bounded_whatever_the_size(tmp_path: Path) -> None:
    """Method: a step of 400 MiB, verified in a new process that may allocate 64 MiB more than at
    its start."""
    import subprocess
    import sys

    import torch

    import holdfast

    holdfast.save(tmp_path / "big", {"w": torch.ones(100 << 20)})
    script = (
        "import resource, sys\n"
        "from holdfast.catalog.verify import VerifyTarget, verify\n"
        "from holdfast.storage.local import LocalStore\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert verify(VerifyTarget(LocalStore(sys.argv[1]), 'big')).good\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], text=True, capture_output=True, check=True
    )
    assert int(ran.stdout) < 64 << 10, f"{ran.stdout} KiB"


def test_a_chunk_that_no_index_names_is_found_without_reading_data(tmp_path: Path) -> None:
    """G6. Method: a stock index replaced by one that lacks one of the tensor's two chunks."""
    import torch

    save_stock(tmp_path / "stock")
    half = Chunk(Region((0,), (4,)), "__0_0.distcp", Span(0, 1000))
    index = encode_metadata(Manifest({"w": TensorEntry("float32", (8,), (half,), ("w",))}, {}))
    # Framed like Python's pickler does, so that it is read as a stock one.
    (tmp_path / "stock/.metadata").write_bytes(index[:2] + b"\x95" + bytes(8) + index[2:])
    torch.save(torch.arange(4.0), tmp_path / "stock/__0_0.distcp")
    (finding, *_) = checked(tmp_path / "stock", quick=True).findings
    assert (finding.entry, finding.what) == ("w", "its chunks hold 4 of 8 elements")


def test_an_error_of_reading_is_a_finding_and_ends_nothing(home: Path) -> None:
    """G3. Method: a folder in place of a data file, which the system refuses to read."""
    path = home / f"step-{STEP}/__1_0.distcp"
    with changed(path):
        path.unlink()
        path.mkdir()
        try:
            with pytest.raises(HoldfastError):
                open_manifest(LocalStore(home), path.parent.name)
            assert not checked(path.parent).good
        finally:
            path.rmdir()
