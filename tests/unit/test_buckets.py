"""Every entry point takes the URL of a bucket, of a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from hf_folders import LLAMA, assert_same, hf_tensors, save_folder, tensors_in
from holdfast.cli.main import main
from holdfast.comm import Solo
from holdfast.convert.target import open_target
from holdfast.errors import ExistsError, FormatError, UsageError
from holdfast.hosts.sealing import sealed_by_all
from holdfast.storage.cloud import CloudBucket
from s3_server import CREDENTIALS, new_s3_url, s3_server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty folder in a new bucket."""
    return f"{new_s3_url(monkeypatch)}/run"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Run a command. Returns its output."""
    assert main(list(arguments)) == status, capsys.readouterr()
    return capsys.readouterr().out


def manager(url: str, model: nn.Module, **settings: Any) -> holdfast.CheckpointManager:
    config = holdfast.CheckpointConfig(enable=True, interval=1, keep_latest_k=2, **settings)
    return holdfast.CheckpointManager(url, model=model, config=config)


def test_save_load_and_open_take_a_url(run: str) -> None:
    """Method: a save, a refused one, a replacing one; a load, and a region of one tensor."""
    path = f"{run}/best"
    holdfast.save(path, {"w": torch.arange(12.0).reshape(4, 3)})
    with pytest.raises(ExistsError, match="exists already"):
        holdfast.save(path, {"w": torch.zeros(4, 3)})
    state = {"w": torch.zeros(4, 3)}
    holdfast.load(path, state)
    assert torch.equal(state["w"], torch.arange(12.0).reshape(4, 3))
    holdfast.save(path, {"w": torch.ones(4, 3)}, overwrite=True)
    assert holdfast.open(path).read("w", (slice(1, 3),)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("profile", ["default", "other"])
def test_credentials_may_be_in_a_profile(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    """Method: no variable has a key. A request without credentials would not be sent."""
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text(f"[{profile}]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    holdfast.save(f"{run}/a", {"w": torch.ones(2)})
    assert holdfast.open(f"{run}/a").read("w").tolist() == [1, 1]


def test_a_run_saves_resumes_and_retains_in_a_bucket(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G5, G16. Method: four steps, a second manager beside the first, a damaged newest step,
    and the commands on that folder."""
    model = nn.Linear(3, 2)
    first = manager(run, model)
    for step in range(1, 5):
        with torch.no_grad():
            model.weight.fill_(step)
        first.save(step)
    with pytest.raises(ExistsError, match="in use by another run"):
        manager(run, nn.Linear(3, 2))
    first.close()
    rows = json.loads(said(capsys, "list", run, "--json"))
    assert [row["step"] for row in rows["checkpoints"]] == [3, 4]
    assert "good" in said(capsys, "verify", run)
    assert "step 4" in said(capsys, "doctor", run)
    assert "put-bucket-lifecycle-configuration" in said(capsys, "doctor", run)
    assert "weight" in said(capsys, "show", f"{run}/step-4")

    bucket = CloudBucket(run)
    (data,) = (one.key for one in bucket.list_all("step-4") if one.key.endswith(".distcp"))
    whole = bucket.get(data, 1 << 20)[0]
    bucket.put(data, bytes(255 - byte for byte in whole))
    other = nn.Linear(3, 2)
    second = manager(run, other)
    resumed = second.load()
    assert resumed is not None
    assert resumed.step == 3
    assert torch.equal(other.weight, torch.full((2, 3), 3.0))
    second.close()
    said(capsys, "verify", run, "--mark", status=7)
    assert "damaged" in said(capsys, "list", run)
    said(capsys, "prune", run, "--damaged", "--keep-latest-k", "2")
    assert [name for name in bucket.list("").prefixes if name.startswith("step")] == ["step-3"]


def test_a_checkpoint_is_converted_to_a_bucket_and_back(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a local checkpoint to a URL, then that to a `.pt` file; and a file in the bucket,
    which only `--overwrite` replaces."""
    holdfast.save(tmp_path / "a", {"w": torch.arange(6.0)})
    said(capsys, "convert", str(tmp_path / "a"), f"{run}/b")
    said(capsys, "convert", f"{run}/b", str(tmp_path / "c.pt"))
    assert torch.equal(torch.load(tmp_path / "c.pt")["w"], torch.arange(6.0))
    said(capsys, "convert", f"{run}/b", f"{run}/d.pt")
    holdfast.save(tmp_path / "e", {"w": torch.ones(6)})
    said(capsys, "convert", str(tmp_path / "e"), f"{run}/d.pt", status=5)
    bucket = CloudBucket(run)
    first = (tmp_path / "c.pt").read_bytes()
    assert bytes(bucket.get("d.pt", 1 << 20)[0]) == first
    said(capsys, "convert", str(tmp_path / "e"), f"{run}/d.pt", "--overwrite")
    (tmp_path / "d.pt").write_bytes(bucket.get("d.pt", 1 << 20)[0])
    assert torch.equal(torch.load(tmp_path / "d.pt")["w"], torch.ones(6))
    said(capsys, "verify", f"{run}/d.pt")


def test_a_model_is_exported_to_a_bucket(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G2. Method: a Hugging Face folder to a checkpoint in a bucket, then to a folder in the
    bucket, twice. Other programs find the files of the folder where a note says."""
    tensors = hf_tensors(LLAMA)
    save_folder(tmp_path / "hf", LLAMA, tensors)
    said(capsys, "convert", str(tmp_path / "hf"), f"{run}/step-5")
    said(capsys, "convert", f"{run}/step-5", f"{run}/model", "--to", "hf")
    said(capsys, "convert", f"{run}/step-5", f"{run}/model", "--to", "hf", status=5)
    out = said(capsys, "convert", f"{run}/step-5", f"{run}/model", "--to", "hf", "--overwrite")
    place = out.split("find the files in ")[1].split()[0]
    assert place.startswith(f"{run}/model/")
    bucket = CloudBucket(place)
    copy = tmp_path / "copy"
    copy.mkdir()
    for found in bucket.list("").objects:
        (copy / found.key).write_bytes(bucket.get(found.key, 1 << 30)[0])
    assert_same(tensors_in(copy), tensors)
    assert (copy / "config.json").exists()
    assert len({key.split("/")[1] for key in _keys(run, "model") if key.count("/") == 2}) == 1
    said(capsys, "convert", f"{run}/model", str(tmp_path / "back"), "--to", "hf")
    assert_same(tensors_in(tmp_path / "back"), tensors)
    pushed = ("--to", "hf", "--push-to-hub", "a/b")
    said(capsys, "convert", f"{run}/step-5", f"{run}/other", *pushed, status=2)


def _keys(run: str, below: str) -> list[str]:
    return [found.key for found in CloudBucket(run).list_all(below)]


def test_a_downloaded_checkpoint_names_its_inner_folder(run: str, tmp_path: Path) -> None:
    """Method: every object of a checkpoint as a file."""
    holdfast.save(f"{run}/a", {"w": torch.arange(6.0)})
    bucket = CloudBucket(run)
    for key in [found.key for found in bucket.list_all("a")]:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.get(key, 1 << 20)[0])
    with pytest.raises(FormatError, match="object store") as refused:
        holdfast.open(tmp_path / "a")
    inner = str(refused.value.hint).split("`")[1]
    assert torch.equal(holdfast.open(inner).read("w"), torch.arange(6.0))


def test_the_door_says_what_a_bucket_cannot_do(run: str) -> None:
    """G16. Method: exports of a run, a whole bucket, other schemes, a URL that `Path` shortened."""
    with pytest.raises(UsageError, match="object store"):
        manager(run, nn.Linear(2, 2), last_save_in_hf=True)
    with pytest.raises(UsageError, match="a whole bucket"):
        holdfast.save(run.removesuffix("/run"), {"w": torch.ones(1)})
    with pytest.raises(UsageError, match="a whole bucket"):
        open_target(run.removesuffix("/run"), overwrite=False)
    with pytest.raises(UsageError, match="cannot write"):
        holdfast.save("https://host/run/a", {"w": torch.ones(1)})
    with pytest.raises(UsageError, match="is a URL"):
        holdfast.save(Path(f"{run}/a"), {"w": torch.ones(1)})


def test_a_url_that_path_shortened_is_not_sealed(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G16. Method: by one process and by all ranks; neither the bucket nor the current folder has
    anything new. The URL of a folder is taken."""
    monkeypatch.chdir(tmp_path)
    path = Path(f"{run}/a")
    with pytest.raises(UsageError, match="is a URL"), holdfast.sealed(path):
        pass
    with (
        pytest.raises(UsageError, match="is a URL"),
        sealed_by_all(str(path), ranks=Solo(), publishes=True, moves_aside=True),
    ):
        pass
    assert [*CloudBucket(run).list_all("")] == []
    assert [*tmp_path.iterdir()] == []
    with holdfast.sealed(f"file://{tmp_path}/a") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a/file").exists()


def test_a_resharding_load_reads_the_bytes_that_it_needs(run: str) -> None:
    """Method: four readers of a quarter of the rows each, of a tensor of 8 MiB; the server counts
    the bytes of data that it sends."""
    weights = torch.randn(2048, 1024)
    holdfast.save(f"{run}/a", {"w": weights})
    ranges: list[int] = []

    def count(environ: dict[str, Any]) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".distcp"):
            start, stop = environ["HTTP_RANGE"].removeprefix("bytes=").split("-")
            ranges.append(int(stop) + 1 - int(start))

    for quarter in range(4):
        rows = slice(512 * quarter, 512 * (quarter + 1))
        with s3_server().answering(count):
            assert torch.equal(holdfast.open(f"{run}/a").read("w", (rows,)), weights[rows])
    assert 1.0 <= sum(ranges) / weights.nbytes < 1.01
