"""`holdfast convert` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.cli.convert import nbytes_of
from holdfast.cli.main import main
from holdfast.errors import UsageError


def test_a_conversion_of_tensors_alone_imports_no_torch(tmp_path: Path) -> None:
    """Method: convert to each format in a fresh interpreter, then check `sys.modules`."""
    source = save_folder(tmp_path / "source", LLAMA, hf_tensors(LLAMA))
    script = (
        "import sys\nfrom holdfast.cli.main import main\n"
        "assert main() == 0\nassert 'torch' not in sys.modules"
    )
    for to in ("dcp", "hf", "torch"):
        paths = str(source), str(tmp_path / to)
        command = [sys.executable, "-c", script, "convert", *paths, "--to", to]
        ran = subprocess.run(command, text=True, capture_output=True)
        assert (ran.returncode, ran.stderr) == (0, ""), to


def test_the_result_is_printed_as_a_line_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: text and JSON output of a conversion with a note."""
    source = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA), num_files=2)
    (source / "old.safetensors").write_bytes(b"")
    assert main(["convert", str(source), str(tmp_path / "step-1")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "note: `old.safetensors` is not in the index, and is ignored"
    assert said[1].startswith(f"{tmp_path / 'step-1'}: 21 tensors, ")
    assert said[1].endswith("B/s)")
    assert main(["convert", str(source), str(tmp_path / "all.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["tensors"]) == (str(tmp_path / "all.pt"), 21)
    assert found["nbytes"] == (tmp_path / "all.pt").stat().st_size
    assert len(found["notes"]) == 1
    assert main(["convert", str(tmp_path / "all.pt"), str(tmp_path / "one.safetensors")]) == 2
    assert "FOLDER --to hf" in capsys.readouterr().err
    assert not (tmp_path / "one.safetensors").exists()


def test_a_name_on_the_hub_is_read_from_its_cache(tmp_path: Path) -> None:
    """Method: a cache as `huggingface_hub` keeps it, with links as files, and no network:
    `org/name` converts; another name prints what to check; a folder of that name comes first."""
    cached = tmp_path / "home/hub/models--org--name"
    snapshot = cached / "snapshots/0123456789012345678901234567890123456789"
    blobs = save_folder(cached / "blobs", LLAMA, hf_tensors(LLAMA))
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(snapshot.name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "holdfast.cli", "convert", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True
        )

    ran = convert("org/name", "step-0")
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = convert("step-0", "out", "--to", "hf", "--hf-assets", "org/name")
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = convert("org/another", "step-1")
    assert ran.returncode == 9
    assert "cannot be downloaded from the hub" in ran.stderr
    (tmp_path / "org/name").mkdir(parents=True)
    assert "is no checkpoint" in convert("org/name", "step-1").stderr
    assert convert("not a name", "step-1").returncode == 4


@pytest.mark.parametrize("text", ["", "GB", "five", "-5GB", "0GB", "5 PB", "1e3"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be a size such as"):
        nbytes_of(text)


def test_a_checkpoint_of_a_hugging_face_model_converts_to_a_file_without_its_configuration(
    tmp_path: Path,
) -> None:
    """G10. Method: a checkpoint with the tensor names of transformers."""
    tensors = hf_tensors(LLAMA)
    holdfast.save(tmp_path / "step-1", tensors)
    assert main(["convert", str(tmp_path / "step-1"), str(tmp_path / "all.pt")]) == 0
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
