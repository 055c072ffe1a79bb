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
from holdfast.hf.values import value_differences


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


WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
"""Half as many heads as LLAMA has, of twice the width: all tensors have the same shapes."""


@pytest.mark.parametrize(
    ("trained", "changed", "named"),
    [
        ({}, WIDE_HEADS, "`num_attention_heads` is 4"),
        ({}, {"model_type": "mistral"}, "`sliding_window` is None and 4096"),
        (
            {"rope_type": "longrope", "long_factor": [1.0]},
            {"long_factor": [2.0]},
            "`rope_scaling.long",
        ),
        ({"partial_rotary_factor": 0.5}, {"rope_theta": 5.0}, "`rope_theta` is 7.0 and 5.0"),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, "`partial_rotary_factor`"),
        ({"full": {"rope_theta": 7.0}}, {"full": {"rope_theta": 5.0}}, "`rope_theta of full`"),
    ],
    ids=["heads", "type", "longrope", "partial", "part", "layers"],
)
def test_values_of_any_kind_are_compared(
    trained: dict[str, Any], changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """G10. Method: values that no native model computes, heads of the same total width, a model of
    another type with the same tensors; without a change, the export is planned."""
    rope = {"rope_theta": 7.0, **trained}
    config = {**LLAMA, "head_dim": 8, "rope_parameters": rope}
    save_folder(tmp_path / "hf", config, hf_tensors(config))
    convert(plan(str(tmp_path / "hf"), ConvertOptions("dcp")), str(tmp_path / "step-0"))
    same = assets(tmp_path / "same", config=config)
    plan(str(tmp_path / "step-0"), ConvertOptions("hf", hf_assets=same))
    is_rope = not changed.keys() & config.keys()
    other = {**config, **({"rope_parameters": {**rope, **changed}} if is_rope else changed)}
    folder = assets(tmp_path / "other", config=other)
    with pytest.raises(MismatchError, match=named):
        plan(str(tmp_path / "step-0"), ConvertOptions("hf", hf_assets=folder))


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 7.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "long_factor": [1.0],
                    "rope_theta": 7.0,
                    "original_max_position_embeddings": 8,
                }
            },
        ),
        ({}, {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}}),
    ],
    ids=["default", "longrope", "defaults-of-the-class"],
)
def test_the_same_values_as_another_version_writes_them_are_no_difference(
    older: dict[str, Any], newer: dict[str, Any]
) -> None:
    """Method: configurations of transformers 4 and 5; a class with defaults of its own, which one
    of them leaves out."""
    config = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4}
    assert value_differences({**config, **older}, {**config, **newer}) == []
    other = {**config, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    if older:
        (line,) = value_differences({**config, **older}, other)
        assert line.startswith("`rope_type` is ")


def test_a_configuration_that_is_made_gets_the_special_tokens(step: Path, tmp_path: Path) -> None:
    """Method: assets that have `generation_config.json`, and no `config.json`."""
    folder = assets(tmp_path / "assets", generation_config={"eos_token_id": [5, 6]})
    convert(plan(str(step), ConvertOptions("hf", hf_assets=folder)), str(tmp_path / "out"))
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made["eos_token_id"] == [5, 6]
