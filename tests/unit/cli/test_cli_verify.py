"""`holdfast verify`: single files, and the output of many findings."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import holdfast
from checkpoints import save_safetensors, save_step, save_stock, save_torch
from holdfast.cli.main import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that two ranks wrote, and one of every other format."""
    home = tmp_path_factory.mktemp("saved")
    save_step(home / "outputs/checkpoint", 3)
    save_stock(home / "stock")
    save_safetensors(home / "hf")
    save_torch(home / "model.pt")
    return home


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "home"))


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command; returns its exit status, stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize(
    ("path", "said", "hint"),
    [
        ("outputs/checkpoint/step-3/__1_0.distcp", "is the data that rank 1 wrote of", "step-3"),
        ("outputs/checkpoint/step-3/manifest.json", "is the index of", "step-3"),
        ("outputs/checkpoint/step-3/.metadata", "is the index for stock torch of", "step-3"),
        ("stock/__0_0.distcp", "is the data that rank 0 wrote of", "stock"),
        ("hf/model.safetensors.index.json", "is the index of the weights of", "hf"),
    ],
)
def test_a_single_file_of_a_checkpoint_is_refused_with_the_command_for_the_checkpoint(
    saved: Path, path: str, said: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: files of checkpoints of each format, given to each command that takes a
    checkpoint."""
    for command in ("verify", "show", "convert", "diff"):
        second: dict[str, list[str | Path]] = {"convert": ["x"], "diff": [saved / "model.pt"]}
        status, out, err = run(capsys, command, saved / path, *second.get(command, []))
        assert (status, out) == (2, "")
        assert said in err
        assert err.splitlines()[1].endswith(hint)
        assert err.splitlines()[1].startswith("hint: holdfast verify ")


def test_verify_names_the_format_of_a_file(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: undamaged and damaged files, one file of two, and files of other programs."""
    assert "good, file of torch.save, 11 entries" in run(capsys, "verify", home / "model.pt")[1]
    shard = "hf/model-00001-of-00002.safetensors"
    said = run(capsys, "verify", home / shard)[1]
    assert "good, safetensors, 1 entry" in said
    assert f"note: it is file 1 of 2: `holdfast verify {home}/hf` checks all" in said
    damage(home / "model.pt")
    assert "1 place, file of torch.save" in run(capsys, "verify", home / "model.pt")[1]
    others = {
        "a.gguf": (b"GGUF" + bytes(8), "a GGUF file of llama.cpp"),
        "a.npy": (bytes([0x93]) + b"NUMPY" + bytes(4), "a file of numpy"),
        "a.h5": (bytes([0x89]) + b"HDF" + bytes(4), "an HDF5 file"),
        "notes": ("Gewichte für später".encode() * 40, "a text file"),
        "nothing": (b"", "an empty file"),
        "noise": (bytes(range(256)), "is no checkpoint: no `manifest.json`"),
        "__3_0.distcp": (b"PK", "is the data that rank 3 wrote of a checkpoint"),
    }
    for name, (data, expected) in others.items():
        (tmp_path / name).write_bytes(data)
        for command in ("verify", "show"):
            status, out, err = run(capsys, command, tmp_path / name)
            assert (status in (2, 4), out) == (True, "")
            assert expected in err
    (tmp_path / "a.npz").write_bytes(_zip())
    assert "a ZIP archive of another program" in run(capsys, "verify", tmp_path / "a.npz")[2]


def _zip() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def test_findings_with_one_cause_are_one_line_with_their_number(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3. Method: overwrite many blocks with zeros; truncate a file; delete a file of a stock
    checkpoint. JSON lists every finding."""
    step = home / "outputs/checkpoint/step-3"
    whole = (step / "__0_0.distcp").read_bytes()
    manifest = holdfast.open(step).manifest
    entry = manifest.tensors["model.large"]
    (chunk,) = (chunk for chunk in entry.chunks if chunk.file == "__0_0.distcp")
    start = chunk.data_offset or 0
    nbytes = chunk.region.num_elements
    (step / "__0_0.distcp").write_bytes(whole[:start] + bytes(nbytes) + whole[start + nbytes :])
    lines = run(capsys, "verify", step)[1].splitlines()
    num_blocks = -(-nbytes // manifest.block_bytes)
    assert lines[0].endswith(f"damaged in {num_blocks} places")
    assert lines[1].startswith("  `__0_0.distcp` `model.large` block 0: has checksum ")
    assert lines[1].endswith(f"; and so {num_blocks - 1} more of its blocks")
    assert lines[2].startswith("  usable: ")
    found = json.loads(run(capsys, "verify", step, "--json")[1])
    assert len(found["checkpoints"][0]["findings"]) == num_blocks

    (step / "__0_0.distcp").write_bytes(whole[:1000])
    lines = run(capsys, "verify", step)[1].splitlines()
    assert f"`__0_0.distcp` has 1000 bytes, {len(whole)} were written; and so " in lines[1]
    assert lines[2].startswith("  usable: ")

    (home / "stock/__0_0.distcp").unlink()
    lines = run(capsys, "verify", home / "stock")[1].splitlines()
    assert lines[1].startswith("  `__0_0.distcp` is missing: it holds `")
    assert lines[1].endswith(" and 7 more")
    assert lines[2].startswith("  usable: ")


def test_checkpoints_under_other_names_are_verified_and_listed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: copy a step under other names, beside it and into a folder of their own; damage one
    copy; mark."""
    run_folder, kept = home / "outputs/checkpoint", home / "kept"
    for copy in (run_folder / "backup-of-good", kept / "first", kept / "second"):
        shutil.copytree(run_folder / "step-3", copy)
    (kept / ".hidden").mkdir()

    listed = run(capsys, "list", run_folder)[1]
    assert "other names, which no resume takes: `backup-of-good`" in listed
    assert listed.endswith("no data; `--verify` reads all data\n")
    assert "no data" not in run(capsys, "list", run_folder, "--verify")[1]
    found = json.loads(run(capsys, "list", run_folder, "--json")[1])
    assert (found["others"], found["verified"]) == (["backup-of-good"], False)

    status, said, _ = run(capsys, "verify", run_folder)
    assert (status, said.count(": good, ")) == (0, 2)
    assert said.endswith("a resume takes step 3\n")
    damage(run_folder / "backup-of-good/__1_0.distcp")
    status, said, error = run(capsys, "verify", run_folder, "--mark")
    assert (status, "backup-of-good: damaged" in said) == (7, True)
    assert "a resume takes step 3" in said
    assert "1 of 2 checkpoints are damaged" in error
    assert "--mark" not in error

    status, said, _ = run(capsys, "verify", kept)
    assert (status, said.count(": good, ")) == (0, 2)
    assert said.endswith("none is named step-N: a resume takes none\n")
    assert "`--mark` needs folders named step-N" in run(capsys, "verify", kept, "--mark")[2]
    for arguments in (["show", str(kept)], ["convert", str(kept), "x.pt"]):
        error = run(capsys, *arguments)[2]
        assert f"hint: checkpoints in it: `first`, `second`; {kept}/second" in error
