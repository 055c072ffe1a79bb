"""Runs start from Hugging Face folders and export to them, sharded on every axis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_folders import assert_same, tensors_in
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from runs import train

EXPERTS = ("--model.name", "qwen3_moe")
STILL = ("--optimizer.lr", "0", "--training.steps", "1")
"""Arguments for a run of one step that changes no weight."""


def degrees(**given: int) -> list[str]:
    return [
        word
        for name, degree in given.items()
        for word in (f"--parallelism.{name}_parallel_degree", str(degree))
    ]


@pytest.mark.parametrize(
    ("model", "first", "then"),
    [
        ((), {"tensor": 2}, {"pipeline": 2}),
        pytest.param(EXPERTS, {"expert": 2}, {"tensor": 2, "context": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_folder_exported_by_one_layout_starts_a_run_of_another(
    model: tuple[str, ...], first: dict[str, int], then: dict[str, int], tmp_path: Path
) -> None:
    """Method: four ranks train two steps in `async` mode, and save a checkpoint and a folder from
    the same snapshot: the folder equals a conversion of the checkpoint. Four ranks of another
    layout start from the folder and export it again, unchanged. Nothing else is left in either
    folder."""
    saving = ("--training.steps", "2", "--checkpoint.interval", "2")
    exporting = ("--checkpoint.hf_export_interval", "2", "--checkpoint.async_mode", "async")
    ran = train(*model, *degrees(**first), *saving, *exporting, ranks=4, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    folder = tmp_path / "outputs/checkpoint/hf/step-2"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["step-2"]

    options = ConvertOptions(to="hf", hf_assets=str(folder))
    step = tmp_path / "outputs/checkpoint/step-2"
    convert(plan(str(step), options), str(tmp_path / "converted"))
    assert_same(tensors_in(folder), tensors_in(tmp_path / "converted"))

    starting = ("--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path", str(folder))
    ending = ("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only")
    again = ("--job.dump_folder", "again", *degrees(**then), *STILL)
    ran = train(*model, *again, *starting, *ending, ranks=4, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout
    assert "loaded the model of" in ran.stdout
    last = tmp_path / "again/checkpoint/step-1"
    assert_same(tensors_in(folder), tensors_in(last))
    assert json.loads((last / "config.json").read_text())["torch_dtype"] == "float32"
    if not model:
        ran = train(*again, *starting, *ending, ranks=4, cwd=tmp_path)
        assert ran.returncode == 0, ran.stdout
        assert "already at step 1 of 1" in ran.stdout
