"""A run takes the values of its model from the `config.json` of the weights that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import MismatchError
from holdfast.hf.flavors import MODELS, config_of
from holdfast.hf.rope import LinearScaling
from holdfast.manager.config import CheckpointConfig
from holdfast.trainer.config import Config, ModelConfig
from holdfast.trainer.published import followed_model

FLAVOR = MODELS["llama3"]["debugmodel"]
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 10000.0}
OTHER = {"num_hidden_layers": 3}


def folder_with(folder: Path, **values: Any) -> str:
    """Write the `config.json` of the small flavor, with other values."""
    folder.mkdir()
    config = {**config_of("llama3", FLAVOR, 256), **values}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def config_with(assets: str | None, **checkpoint: Any) -> Config:
    settings = CheckpointConfig(enable=True, **checkpoint)
    return Config(model=ModelConfig(hf_assets_path=assets), checkpoint=settings)


def test_a_run_follows_the_folder_that_it_starts_from_before_its_assets(tmp_path: Path) -> None:
    """Method: values in `hf_assets_path` alone; other ones in `initial_load_path`, which count only
    if the run starts there; no folder. Exports get the `config.json` that the run follows."""
    assets = folder_with(tmp_path / "assets", rms_norm_eps=1e-3)
    weights = folder_with(tmp_path / "weights", **LINEAR)
    followed = followed_model(config_with(assets), 256)
    assert (followed.flavor.norm_eps, followed.flavor.rope_theta) == (1e-3, FLAVOR.rope_theta)
    assert followed.hf_model.config["rms_norm_eps"] == 1e-3

    start = {"initial_load_in_hf": True, "initial_load_path": weights}
    followed = followed_model(config_with(assets, **start), 256)
    assert (followed.flavor.rope_scaling, followed.flavor.rope_theta) == (LinearScaling(4), 1e4)
    assert followed.flavor.norm_eps == FLAVOR.norm_eps
    assert followed.hf_model.config["rope_scaling"] == LINEAR["rope_scaling"]
    assert followed.hf_model.assets == assets

    alone = followed_model(config_with(None), 256)
    assert alone.flavor == FLAVOR
    assert alone.hf_model.config == config_of("llama3", FLAVOR, 256)


def test_a_run_does_not_start_from_values_or_sizes_that_it_does_not_have(tmp_path: Path) -> None:
    """G10: every value that the native model does not compute is named; so are other sizes, and
    another model."""
    gelu = folder_with(tmp_path / "gelu", hidden_act="gelu", attention_bias=True)
    for start in ({}, {"initial_load_in_hf": True}):
        with pytest.raises(MismatchError, match=r"gelu.*\n.*`attention_bias` is True"):
            followed_model(config_with(gelu, **start), 256)
    for name, values, text in (
        ("other", OTHER, "num_hidden_layers is 6 and 3"),
        ("qwen2", {"model_type": "qwen2"}, "model_type is qwen2, expected: llama or mistral"),
    ):
        folder = folder_with(tmp_path / name, **values)
        with pytest.raises(MismatchError, match=text):
            followed_model(config_with(folder, initial_load_in_hf=True), 256)


def test_assets_of_another_model_give_the_tokenizer_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: a run that does not start from the assets; the log says so if the run exports."""
    assets = folder_with(tmp_path / "other", **OTHER, rms_norm_eps=1e-3)
    assert followed_model(config_with(assets), 256).flavor == FLAVOR
    assert not caplog.text
    followed = followed_model(config_with(assets, last_save_in_hf=True), 256)
    assert followed.flavor == FLAVOR
    assert followed.hf_model.config["num_hidden_layers"] == FLAVOR.num_layers
    assert "exports get a `config.json` of their own" in caplog.text
