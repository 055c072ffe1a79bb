"""The name of a target selects the format, or is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.cli.main import main
from holdfast.convert.target_format import TargetFormat, target_format
from holdfast.errors import UsageError


@pytest.mark.parametrize(
    ("target", "to", "expected"),
    [
        ("step-1", None, "dcp"),
        ("Llama-3.1-8B", None, "dcp"),
        ("Llama-3.1-8B", "hf", "hf"),
        ("v2.0", "hf", "hf"),
        ("a.pt", None, "torch"),
        ("a.PTH", None, "torch"),
        ("a.bin", "torch", "torch"),
        ("weights", "torch", "torch"),
    ],
)
def test_the_suffix_selects_a_checkpoint_or_a_torch_file(
    target: str, to: TargetFormat | None, expected: TargetFormat
) -> None:
    assert target_format("x", target, to) == expected


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        ("out.gguf", None, "`holdfast convert` cannot write .gguf files"),
        ("out.GGUF", "hf", "cannot write .gguf files"),
        ("out.gguf", "torch", "cannot write .gguf files"),
        ("out.gguf/", "dcp", "cannot write .gguf files"),
        ("model.onnx", None, "cannot write .onnx files"),
        ("a.npz", None, "cannot write .npz files"),
        ("a.json", "hf", "cannot write .json files"),
        ("a.safetensors", None, "safetensors are written as a folder"),
        ("pytorch_model.bin", None, "may be meant as a file of torch"),
        ("last.ckpt", "dcp", "may be meant as a file of torch"),
        ("a.pt", "hf", "is the name of a file, but `--to hf` writes a folder"),
    ],
)
def test_a_suffix_of_another_format_is_refused_with_a_command_that_works(
    target: str, to: TargetFormat | None, message: str
) -> None:
    with pytest.raises(UsageError, match="`") as raised:
        target_format("x", target, to)
    assert message in raised.value.what
    assert "holdfast convert x " in (raised.value.hint or "")


def test_a_refused_target_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holdfast.save(tmp_path / "x", {"w": torch.ones(2)})
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "below/out.gguf")]) == 2
    assert "convert_hf_to_gguf.py" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


WITHOUT = (
    "import sys\nsys.modules[sys.argv.pop(1)] = None\n"
    "from holdfast.cli.main import main\nsys.exit(main())"
)


def without(package: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Run a command where a package cannot be imported. Returns its exit status and stderr."""
    command = [sys.executable, "-c", WITHOUT, package, *arguments]
    ran = subprocess.run(command, text=True, capture_output=True, cwd=cwd)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stderr


def test_only_values_in_pt_files_need_torch(tmp_path: Path) -> None:
    """Method: an interpreter that cannot import torch. Tensors, and values from checkpoint to
    checkpoint, are converted; values from or to a `.pt` file are refused, and nothing is left."""
    holdfast.save(tmp_path / "x", {"model": {"w": torch.ones(2)}, "step": 5})
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    assert without("torch", "convert", "x", "copy", cwd=tmp_path) == (0, "")
    assert holdfast.open(tmp_path / "copy").value("step") == 5
    assert without("torch", "convert", "x", "m.pt", "--model-only", cwd=tmp_path) == (0, "")
    for source, target in (("x", "below/all.pt"), ("x.pt", "below/step-1")):
        status, stderr = without("torch", "convert", source, target, cwd=tmp_path)
        assert status == 2
        assert (
            f"error: `{tmp_path}/{source}` has values that are not tensors, which need torch"
            in stderr
        )
        assert "hint: pip install torch; or `--model-only`" in stderr
    assert not (tmp_path / "below").exists()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    holdfast.save(tmp_path / "x", {"w": torch.ones(2)})
    for package in ("numpy", "tyro"):
        status, stderr = without(package, "convert", "x", "y", cwd=tmp_path)
        expected = f"error: `holdfast convert` needs `{package}`, which is not installed\n"
        assert (status, stderr) == (2, f"{expected}hint: pip install {package}\n")
