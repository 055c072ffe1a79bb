"""`holdfast diff`, and the statistics of `holdfast show`, compared with torch's results."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints import save_step, save_stock, save_torch
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.catalog.open_any import open_any
from holdfast.catalog.paths import open_for_reading
from holdfast.cli import elements
from holdfast.cli.compare import ComparedTensor, compare
from holdfast.cli.main import main
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.tensors.stored import StoredTensors

DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state in every format."""
    home = tmp_path_factory.mktemp("saved")
    save_step(home / "steps", 1)
    save_step(home / "steps", 2)
    save_stock(home / "stock")
    save_torch(home / "model.pt")
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([*map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def found(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, dict[str, Any]]:
    """Returns the tensors of a diff by name."""
    said = json.loads(run(capsys, "diff", *arguments, "--json")[1])
    return {one["name"]: one for one in said["tensors"]}


def test_equal_checkpoints_are_compared_without_reading_their_data(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: two saves of one state; then the data of one is overwritten, but not its checksums.
    The two still compare equal, since no data is read."""
    status, said, err = run(capsys, "diff", saved / "steps/step-1", saved / "steps/step-2")
    assert (status, err) == (0, "")
    assert said == "equal: 7 tensors, 6 of them by recorded checksums, 3 values\n"
    broken = Path(shutil.copytree(saved / "steps/step-1", tmp_path / "step-1"))
    for file in broken.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    assert run(capsys, "verify", broken)[0] == 7
    assert run(capsys, "diff", saved / "steps/step-2", broken, "--model-only")[0] == 0


@pytest.mark.parametrize(("a", "b"), [("steps/step-1", "stock"), ("stock", "model.pt")])
def test_one_state_compares_equal_in_every_format(
    saved: Path, a: str, b: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: checkpoints of Holdfast and of stock DCP, a `.pt` file with one more tensor."""
    tensors = found(capsys, saved / a, saved / b)
    unequal = {name: one["state"] for name, one in tensors.items() if one["state"] != "equal"}
    assert unequal == ({"transposed": "only in b"} if b == "model.pt" else {})
    assert not any(one["by_checksum"] for one in tensors.values() if one["num_elements"])


def test_differences_are_listed_with_their_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: other elements, dtype, shape, names; equal elements in another dtype; exit status."""
    ours = {
        "same": torch.ones(3),
        "apart": torch.tensor([1.0, 2.0, 4.0]),
        "rounded": torch.tensor([1.0, 0.1]),
        "kept": torch.tensor([1.0, 0.5]),
        "cut": torch.ones(2, 3),
        "ours": torch.ones(1),
    }
    theirs = {
        **{name: ours[name].clone() for name in ("same", "apart")},
        "rounded": ours["rounded"].bfloat16(),
        "kept": ours["kept"].bfloat16(),
        "cut": torch.ones(3, 2),
        "theirs": torch.ones(1),
    }
    theirs["apart"][2] = 5.0
    save_file(ours, tmp_path / "a.safetensors")
    save_file(theirs, tmp_path / "b.safetensors")
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    status, said, err = run(capsys, "diff", *paths)
    assert (status, "differ in 6 places" in err) == (6, True)
    lines = dict(line.split(": ", 1)[::-1] for line in said.splitlines())
    assert "apart  float32 3  1 of 3 elements differ by up to 1, 0.2 of their size" in lines
    assert lines["cut  float32 2x3 -> 3x2"] == "shape"
    assert lines["kept  float32 -> bfloat16 2"] == "dtype"
    assert lines["ours  float32 1"] == "only in a"
    assert lines["theirs  float32 1"] == "only in b"
    assert said.splitlines()[-1] == "equal: 1 tensor"
    assert found(capsys, *paths)["rounded"]["num_differing"] == 1


@pytest.mark.parametrize("changed", [False, True])
def test_a_hugging_face_folder_is_compared_with_a_native_checkpoint(
    tmp_path: Path, changed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a small Llama, converted, on either side; then one element is changed."""
    tensors = hf_tensors(LLAMA)
    source = save_folder(tmp_path / "hf", LLAMA, tensors, num_files=2)
    options = ConvertOptions(to="dcp")
    convert(plan(str(source), options), str(tmp_path / "step-0"))
    if changed:
        tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1
        source = save_folder(tmp_path / "changed", LLAMA, tensors)
    for pair in ((source, tmp_path / "step-0"), (tmp_path / "step-0", source)):
        differing = [one for one in found(capsys, *pair).values() if one["state"] != "equal"]
        names = [one["name"] for one in differing]
        assert names == (["layers.1.attention.wq.weight"] if changed else [])
        assert [one["num_differing"] for one in differing] == [1] * changed
    assert run(capsys, "diff", source, tmp_path / "step-0", "--model-only")[0] == 6 * changed


def test_neither_diff_nor_statistics_import_torch(saved: Path) -> None:
    """Method: run both in fresh interpreters, then check `sys.modules`."""
    script = (
        "import sys\nfrom holdfast.cli.main import main\n"
        "assert main() == 0\nassert 'torch' not in sys.modules"
    )
    for arguments in (
        ("diff", saved / "steps/step-1", saved / "stock"),
        ("show", saved / "steps/step-1", "model.half", "--stats", "--values"),
    ):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        ran = subprocess.run(command, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stderr


def test_statistics_and_values_are_printed_of_one_tensor_only(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: text; JSON, where NaN is text; a branch, which is refused."""
    step = saved / "steps/step-1"
    said = run(capsys, "show", step, "model.scalar", "--stats", "--values")[1]
    assert "mean               1.5" in said
    assert said.splitlines()[-1].split() == ["1.5"]
    empty = json.loads(run(capsys, "show", step, "model.empty", "--stats", "--json")[1])
    assert empty["statistics"]["mean"] == "nan"
    status, _, err = run(capsys, "show", step, "model", "--stats")
    assert (status, "read one tensor" in err) == (2, True)


def tensor(data: Any, dtype: str, shape: list[int]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    made = torch.Generator().manual_seed(data)
    if dtype == "bool" or not (kind.is_floating_point or kind.is_complex):
        return torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=made).to(kind)
    wide = torch.randn(shape, generator=made)
    return torch.complex(wide, wide.flip(0)) if kind.is_complex else wide.to(kind)


def wide(one: torch.Tensor) -> torch.Tensor:
    return one.to(torch.complex128 if one.is_complex() else torch.float64)


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.integers(0, 3),
)
def test_differences_equal_those_that_torch_computes(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], seed: int, edits: int
) -> None:
    """Method: any dtype and shape, a few elements replaced. NaN equals only NaN."""
    a, b = tensor(seed, dtype, shape), tensor(seed, dtype, shape)
    flat, other = b.view(-1), tensor(seed + 1, dtype, shape).view(-1)
    for edit in range(min(edits, flat.numel())):
        flat[edit] = other[edit]
    if dtype == "float32" and edits == 3:
        a.view(-1)[-1], flat[-1] = math.nan, math.nan
    folder = tmp_path_factory.mktemp("pair")
    for name, one in (("a", a), ("b", b)):
        torch.save({"t": one}, folder / f"{name}.pt")
    ours, theirs = (open_any(*open_for_reading(folder / f"{name}.pt")) for name in "ab")
    got = compare(
        "t",
        ComparedTensor(StoredTensors(ours.source, ours.strides), "t"),
        ComparedTensor(StoredTensors(theirs.source, theirs.strides), "t"),
    )
    same = (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b
    assert got.num_differing == int((~same).sum())
    apart = (wide(a) - wide(b)).abs()[~same]
    assert got.max_abs == pytest.approx(float(apart.max()) if apart.numel() else 0.0)
    if apart.numel():
        larger = torch.maximum(wide(a).abs(), wide(b).abs())[~same]
        assert got.max_rel == pytest.approx(float((apart / larger).max()))


@given(
    st.sampled_from([dtype for dtype in DTYPES if dtype != "complex64"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 1000),
    st.sampled_from([1 << 5, 8 << 20]),
)
def test_statistics_equal_those_that_torch_computes(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], seed: int, window: int
) -> None:
    """Method: any dtype and shape, in one box or in boxes of 32 bytes, some elements NaN."""
    one = tensor(seed, dtype, shape)
    if dtype in ("float32", "bfloat16") and one.numel() > 2:
        one.view(-1)[:2] = torch.tensor([math.nan, -math.inf])
    path = tmp_path_factory.mktemp("one") / "one.pt"
    torch.save({"t": one}, path)
    before = elements.WINDOW_BYTES
    elements.WINDOW_BYTES = window
    try:
        seen = open_any(*open_for_reading(path))
        got = elements.statistics(StoredTensors(seen.source, seen.strides), "t")
    finally:
        elements.WINDOW_BYTES = before
    finite = wide(one)[wide(one).isfinite()]
    assert got.num_elements == one.numel()
    assert got.num_zeros == int((wide(one) == 0).sum())
    assert got.num_nan + got.num_inf == one.numel() - finite.numel()
    assert (got.least, got.greatest) == (float(finite.min()), float(finite.max()))
    assert got.mean == pytest.approx(float(finite.mean()), rel=1e-9, abs=1e-12)
    assert got.std == pytest.approx(float(finite.std(correction=0)), rel=1e-6, abs=1e-9)
