"""The benchmark of accelerators, tried on the CPU with a small state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu


def test_the_benchmark_of_an_accelerator_runs_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a small state, and two systems. The page has a row for each, the rates of copies and
    loads, and the result of the resume."""
    monkeypatch.setattr(gpu, "silence_warnings", lambda: None)
    monkeypatch.setattr(gpu, "WIDTH", 256)
    monkeypatch.setattr(gpu, "PLAIN_STEPS", 1)
    # The others start processes that import torch.
    few = ("holdfast, async_with_pinned_mem", "dcp.async_save, pinned")
    all_systems = gpu.systems
    monkeypatch.setattr(gpu, "systems", lambda d: {n: all_systems(d)[n] for n in few})
    arguments = ["--device", "cpu", "--gigabytes", "0.002", "--folder", str(tmp_path / "disk")]
    status = gpu.main([*arguments, "--out", str(tmp_path / "out"), "--only", "async"])
    assert status == 0
    page = (tmp_path / "out/gpu.md").read_text()
    stored = json.loads((tmp_path / "out/data/gpu.json").read_text())
    assert "A resume gives the same bits." in page
    assert "| holdfast, from the page cache |" in page
    assert "| device to host, pageable |" in page
    figures = stored["figures"]
    assert "holdfast, async_with_pinned_mem" in figures
    # Some versions of torch for CUDA cannot pin memory without a GPU. The page says so.
    pins = "dcp.async_save, pinned: " not in page
    assert ("dcp.async_save, pinned" in figures) == pins
    if torch.version.cuda is None or torch.cuda.is_available():
        assert pins
    (ours,) = figures["holdfast, async_with_pinned_mem"]
    assert 0 < ours["blocked_s"] <= ours["durable_s"]
    assert ours["copy_gb_per_s"] > 0
    for plot in ("gpu-blocked_s.svg", "gpu-lost_s.svg"):
        assert ("dcp.async_save, pinned" in (tmp_path / "out" / plot).read_text()) == pins
    assert not [*(tmp_path / "disk").iterdir()]
    assert "holdfast, async_with_pinned_mem: first_blocked_s" in capsys.readouterr().out


def test_systems_without_time_left_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: no time at all. Then no system has a row, and the page says which were left out."""
    monkeypatch.setattr(gpu, "silence_warnings", lambda: None)
    monkeypatch.setattr(gpu, "WIDTH", 256)
    monkeypatch.setattr(gpu, "SECONDS_MAX", -1.0)
    arguments = ["--device", "cpu", "--gigabytes", "0.002", "--folder", str(tmp_path / "disk")]
    assert gpu.main([*arguments, "--out", str(tmp_path), "--only", "dcp.save"]) == 0
    assert "dcp.save: not measured, no time was left." in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no accelerator, found: none; --device cpu runs without one"),
        (("--device", "npu"), "no accelerator of kind `npu`, found: none"),
        (("--device", "cpu", "--only", "nosuch"), "no system has `nosuch` in its name: holdfast"),
        (("--device", "cpu", "--gigabytes", "0"), "--gigabytes must be greater than 0"),
    ],
)
def test_a_wrong_argument_and_a_missing_accelerator_are_one_line(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: no device, or one of another kind; a name that no system has; no state."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        gpu.main([*arguments])
    assert raised.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err.replace("--only: ", "")
