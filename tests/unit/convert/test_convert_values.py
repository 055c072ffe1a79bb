"""Conversions keep the values that a model was trained with, beside its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A checkpoint that records its configuration."""
    save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    convert(plan(str(tmp_path / "hf"), ConvertOptions("dcp")), str(tmp_path / "step-0"))
    return tmp_path / "step-0"


def assets(folder: Path, **files: Any) -> str:
    folder.mkdir()
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return str(folder)


def test_an_export_with_other_values_than_were_trained_is_refused(
    step: Path, tmp_path: Path
) -> None:
    """G10. Method: assets with another rotary base; a checkpoint with them has a note instead."""
    changed = assets(tmp_path / "assets", config={**LLAMA, "rope_theta": 7.0})
    with pytest.raises(MismatchError, match=r"`rope_theta` is [0-9.]+ and 7\.0"):
        plan(str(step), ConvertOptions("hf", hf_assets=changed))
    new = plan(str(step), ConvertOptions("dcp", hf_assets=changed, model_only=True))
    assert any("`rope_theta`" in note for note in new.notes)
    convert(new, str(tmp_path / "step-1"))
    exported = plan(str(tmp_path / "step-1"), ConvertOptions("hf", hf_assets=changed))
    assert not any("rope_theta" in note for note in exported.notes)


def test_a_configuration_that_is_made_gets_the_special_tokens(step: Path, tmp_path: Path) -> None:
    """Method: assets that have `generation_config.json`, and no `config.json`."""
    folder = assets(tmp_path / "assets", generation_config={"eos_token_id": [5, 6]})
    convert(plan(str(step), ConvertOptions("hf", hf_assets=folder)), str(tmp_path / "out"))
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made["eos_token_id"] == [5, 6]
