"""What a target is called decides what is written, or that nothing is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.cli.main import main
from holdfast.convert.form import Form, form_of
from holdfast.errors import UsageError


@pytest.mark.parametrize(
    ("target", "to", "form"),
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
def test_a_folder_and_a_file_of_torch_are_told_by_their_names(
    target: str, to: Form | None, form: Form
) -> None:
    assert form_of("x", target, to) == form


@pytest.mark.parametrize(
    ("target", "to", "said"),
    [
        ("out.gguf", None, "a file of GGUF, which is not written here"),
        ("out.GGUF", "hf", "a file of GGUF"),
        ("out.gguf", "torch", "a file of GGUF"),
        ("out.gguf/", "dcp", "a file of GGUF"),
        ("model.onnx", None, "a file of ONNX"),
        ("a.npz", None, "a file of numpy"),
        ("a.json", "hf", "a file of JSON"),
        ("a.safetensors", None, "safetensors are written as a folder"),
        ("pytorch_model.bin", None, "may name a file of torch"),
        ("last.ckpt", "dcp", "may name a file of torch"),
        ("a.pt", "hf", "is the name of a file, but `--to hf` writes a folder"),
    ],
)
def test_a_name_of_another_format_is_refused_with_what_would_do(
    target: str, to: Form | None, said: str
) -> None:
    with pytest.raises(UsageError, match="`") as raised:
        form_of("x", target, to)
    assert said in raised.value.what
    assert "holdfast convert x " in (raised.value.hint or "")


def test_nothing_is_written_where_a_target_is_refused(
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
    """Exit status and stderr of a command where a package cannot be imported."""
    command = [sys.executable, "-c", WITHOUT, package, *arguments]
    ran = subprocess.run(command, text=True, capture_output=True, cwd=cwd)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stderr


def test_what_needs_torch_says_so_where_there_is_none(tmp_path: Path) -> None:
    """Method: an interpreter that cannot import torch. Values go from step to step as they are, and
    tensors anywhere; to and from a `.pt` file values need torch, and nothing is left behind."""
    holdfast.save(tmp_path / "x", {"model": {"w": torch.ones(2)}, "step": 5})
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    assert without("torch", "convert", "x", "copy", cwd=tmp_path) == (0, "")
    assert holdfast.open(tmp_path / "copy").value("step") == 5
    assert without("torch", "convert", "x", "m.pt", "--model-only", cwd=tmp_path) == (0, "")
    for source, target in (("x", "below/all.pt"), ("x.pt", "below/step-1")):
        status, said = without("torch", "convert", source, target, cwd=tmp_path)
        assert status == 2
        assert f"error: `{tmp_path}/{source}` holds values that are not tensors, which only" in said
        assert "hint: pip install torch; or `--model-only`" in said
    assert not (tmp_path / "below").exists()


def test_any_other_package_that_is_missing_is_named(tmp_path: Path) -> None:
    holdfast.save(tmp_path / "x", {"w": torch.ones(2)})
    for package in ("numpy", "tyro"):
        status, said = without(package, "convert", "x", "y", cwd=tmp_path)
        expected = f"error: `holdfast convert` needs `{package}`, which is not installed\n"
        assert (status, said) == (2, f"{expected}hint: pip install {package}\n")
