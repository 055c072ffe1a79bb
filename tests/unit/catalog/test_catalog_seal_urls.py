"""`sealed` and `newest_good` with a URL: a real server of S3, and a bucket whose requests are
cut."""

from __future__ import annotations

import logging
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import holdfast
from bucket_cuts import MODES, Cut, Mode
from buckets import Dead, Fail, ModelBucket
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.catalog.fetch import fetch
from holdfast.catalog.newest import LocalCopies, newest_name, why_not_good
from holdfast.catalog.paths import open_for_reading
from holdfast.catalog.seal import Unsealed
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.storage import streams
from holdfast.storage.cloud import CloudBucket
from holdfast.storage.objects import ObjectStore
from s3_server import new_s3_url

BIG = bytes(range(256)) * (5 << 12) * 4
"""20 MiB: several blocks, and an upload in parts."""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> Iterator[str]:
    """URL of a run. In the end, no file of a checkpoint is left in the temporary folder."""
    yield f"{new_s3_url(monkeypatch)}/run"
    assert not list(temporary.iterdir())


def save(url: str, step: int) -> None:
    with holdfast.sealed(f"{url}/checkpoint-{step}", overwrite=True) as folder:
        (folder / "model.bin").write_bytes(BIG + bytes([step]))
        (folder / "inner").mkdir()
        (folder / "inner/state").write_bytes(bytes([step]))
        (folder / "empty").write_bytes(b"")


def change(url: str, file: str) -> None:
    bucket = CloudBucket(url)
    key = next(one.key for one in bucket.list_all("") if one.key.endswith(file))
    bucket.put(key, bytes(len(bytes(bucket.get(key, 1 << 30)[0]))))


def test_a_checkpoint_goes_to_the_store_and_back(url: str, tmp_path: Path) -> None:
    """G4. A folder in the folder, an empty file, and the seal. The damaged newest checkpoint is
    passed over, and its copy does not stay."""
    for step in (1, 2, 3):
        save(url, step)
    assert holdfast.check(f"{url}/checkpoint-3") == []
    change(f"{url}/checkpoint-3", "model.bin")
    copies = tmp_path / "copies"
    newest = holdfast.newest_good(url, fetch_to=copies)
    assert newest is not None
    assert [path.name for path in copies.glob("*/*")] == ["checkpoint-2"]
    assert newest == next(copies.glob("*/*"))
    assert (newest / "model.bin").read_bytes() == BIG + b"\2"
    assert (newest / "inner/state").read_bytes() == b"\2"
    assert (newest / "empty").read_bytes() == b""
    assert holdfast.check(newest) == []


def test_a_copy_is_used_again_if_it_is_good(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged copy is made again, and a new version of the checkpoint gets a copy of its own. The
    same for a checkpoint of Holdfast, and for one that nothing can check."""
    caplog.set_level(logging.INFO)

    def fetched() -> Path:
        found = holdfast.newest_good(url, fetch_to=tmp_path / "a")
        assert found is not None
        return found

    save(url, 1)
    first = fetched()
    assert fetched() == first
    assert caplog.text.count("fetched") == 1
    (first / "inner/state").write_bytes(b"x")
    assert fetched() == first
    assert (first / "inner/state").read_bytes() == b"\1"
    assert caplog.text.count("fetched") == 2
    with holdfast.sealed(f"{url}/checkpoint-1", overwrite=True) as folder:
        (folder / "other").write_bytes(b"1")
    assert fetched() != first
    holdfast.save(f"{url}/checkpoint-2", {"w": torch.ones(3)})
    assert fetched() == fetched()
    assert torch.equal(holdfast.open(fetched()).read("w"), torch.ones(3))
    plain = url.replace("/run", "/plain")
    CloudBucket(f"{plain}/checkpoint-3").put("model.bin", b"1")
    for _ in range(2):
        found = holdfast.newest_good(plain, fetch_to=tmp_path / "b")
        assert found is not None
        assert (found / "model.bin").read_bytes() == b"1"


def test_a_folder_to_copy_to_is_needed(url: str) -> None:
    with pytest.raises(holdfast.UsageError, match="fetch_to"):
        holdfast.newest_good(url)
    with pytest.raises(holdfast.UsageError, match="is a URL"):
        holdfast.newest_good(url, fetch_to="s3://bucket/other")
    with (
        pytest.raises(holdfast.UsageError, match="cannot write"),
        holdfast.sealed("https://example.invalid/run/checkpoint-1"),
    ):
        pass


def test_a_failed_block_changes_nothing(url: str) -> None:
    save(url, 1)
    with pytest.raises(KeyError), holdfast.sealed(f"{url}/checkpoint-2") as folder:
        (folder / "model.bin").write_bytes(b"half")
        raise KeyError("mine")
    with (
        pytest.raises(holdfast.UsageError, match="nothing was written"),
        holdfast.sealed(f"{url}/checkpoint-2"),
    ):
        pass
    with pytest.raises(holdfast.ExistsError), holdfast.sealed(f"{url}/checkpoint-1"):
        pass
    assert CloudBucket(url).list("").prefixes == ["checkpoint-1"]
    assert holdfast.check(f"{url}/checkpoint-1") == []


def test_a_full_disk_is_an_error_and_leaves_no_copy(url: str, tmp_path: Path) -> None:
    """Method: this process may write files of at most 1 MiB."""
    save(url, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(holdfast.StorageError, match=r"(?s)File too large.*room"):
            holdfast.newest_good(url, fetch_to=tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "a").iterdir())


def test_a_file_that_still_changes_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a request before the upload of the file changes it, as a thread could."""
    folder: list[Path] = []

    def fail(verb: str, key: str, when: str) -> None:
        if (verb, when) == ("head", "before") and key.endswith("model.bin"):
            (folder[0] / "model.bin").write_bytes(BIG[::-1])

    unsealed = begun(ModelBucket(), fail, 1)
    folder.append(unsealed.folder)
    (unsealed.folder / "model.bin").write_bytes(BIG)
    with pytest.raises(holdfast.StorageError, match="has changed while it was saved"):
        unsealed.seal()
    unsealed.abort()


def test_a_file_outside_of_the_copy_is_refused(tmp_path: Path) -> None:
    """Method: a key of a bucket has `..` in it."""
    bucket = ModelBucket({"step-1/../../evil": b"1", "step-1/good": b"1"})
    with pytest.raises(holdfast.FormatError, match="not a valid name"):
        fetch(ObjectStore(bucket.client(), threads=1), "step-1", tmp_path / "a", None)
    assert not list(tmp_path.rglob("evil"))


# ------------------------------------------------------------------------------- changing meanwhile


@pytest.mark.parametrize("what", ["replaced", "deleted"])
def test_a_checkpoint_that_changes_during_its_copy_is_found_as_it_is(
    temporary: Path, tmp_path: Path, what: str
) -> None:
    """G4. Method: while a file is copied, another process replaces the checkpoint, or saves a later
    one and deletes this one. The copy is that of the newest version, whole."""
    bucket = ModelBucket()
    save_in(bucket, lambda *_: None, 1, b"old" * 1000)
    changed: list[str] = []

    def change(verb: str, key: str, when: str) -> None:
        if (verb, when) != ("get_range", "before") or not key.endswith("model.bin") or changed:
            return
        changed.append(key)
        save_in(bucket, lambda *_: None, 1 if what == "replaced" else 2, b"new" * 1000)
        if what == "deleted":
            other = Catalog(ObjectStore(bucket.client(), threads=1))
            other.store.remove(other.set_aside_for_deletion("checkpoint-1"))

    store = ObjectStore(bucket.client(change), threads=1)
    copies = LocalCopies(tmp_path / "copies")
    found = newest_name(store, re.compile("checkpoint-.*"), copies.why_not)
    assert found == ("checkpoint-1" if what == "replaced" else "checkpoint-2")
    assert changed
    assert (copies.paths[found] / "model.bin").read_bytes() == b"new" * 1000
    assert why_not_good(*open_for_reading(copies.paths[found])) is None


def test_a_copied_checkpoint_is_refused_before_the_upload(temporary: Path) -> None:
    """Method: another tool has copied a sealed folder there. Nothing of the new one is uploaded."""
    bucket = ModelBucket({"checkpoint-1/model.bin": b"1"})
    with pytest.raises(holdfast.ExistsError, match="copied here"):
        save_in(bucket, lambda *_: None, 1, b"new")
    assert [key for key in bucket.contents() if "held-" not in key] == ["checkpoint-1/model.bin"]


# ------------------------------------------------------------------------------------ cut requests


def begun(bucket: ModelBucket, fail: Fail, step: int) -> Unsealed:
    catalog = Catalog(ObjectStore(bucket.client(fail), threads=1))
    put_in_order(catalog.store)
    attempt = catalog.begin(f"checkpoint-{step}", replace=True)
    return Unsealed(catalog, attempt, is_durable=True, temporary=TemporaryFolder.make())


def save_in(bucket: ModelBucket, fail: Fail, step: int, content: bytes) -> None:
    unsealed = begun(bucket, fail, step)
    try:
        (unsealed.folder / "model.bin").write_bytes(content)
        (unsealed.folder / "inner").mkdir()
        (unsealed.folder / "inner/state").write_bytes(content[:5])
        unsealed.seal()
        unsealed.publish()
    except BaseException:
        with suppress(Dead):
            unsealed.abort()
        raise


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("replaces", [False, True])
def test_every_request_of_a_save_may_be_cut(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, replaces: bool
) -> None:
    """G1, G2. Method: each changing request of a save, of a new or an existing name: the process
    dies before or after it, or it fails, or its answer is lost. The old checkpoint is good, or the
    new one is. A save that returned has saved. A cleanup leaves nothing else."""
    monkeypatch.setattr(streams, "PART_BYTES", 1000)
    old, new = b"old" * 1000, b"new" * 1000
    step, at, was_cut = 1 if replaces else 2, 0, True
    while was_cut:
        bucket, cut, returned = ModelBucket(), Cut(at, mode), False
        save_in(bucket, lambda *_: None, 1, old)
        with suppress(Dead, holdfast.HoldfastError):
            save_in(bucket, cut, step, new)
            returned = True
        was_cut = cut.done
        bucket.ahead += timedelta(hours=1)
        store = ObjectStore(bucket.client(), threads=1)
        put_in_order(store)
        names = [name for name in store.list() if not name.startswith(".held-")]
        assert names in (["checkpoint-1/"], ["checkpoint-1/", f"checkpoint-{step}/"]), str(cut)
        for name in names:
            assert why_not_good(store, name.rstrip("/")) is None, str(cut)
        if returned:
            assert store.read(f"checkpoint-{step}/inner/state", 0, 5) == new[:5], str(cut)
        prefixes = {key.rpartition("/")[0] for key in bucket.contents() if "held-" not in key}
        assert len(prefixes) == 3 * len(names), str(cut)
        at += 1
    assert returned
    assert at > 5
