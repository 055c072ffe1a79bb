"""Flavors, compared with transformers and with `config.json`."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
import transformers

import hf_models
from hf_folders import hf_tensors, save_folder
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError, UsageError
from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of
from holdfast.hf.published import TYPES, flavors_of, published

EVERY = [(name, flavor) for name in TYPES for flavor in flavors_of(name)]


@pytest.mark.parametrize(("name", "flavor"), EVERY)
def test_a_flavor_has_as_many_elements_as_in_transformers(name: str, flavor: str) -> None:
    """Method: make a model on the meta device from the flavor's configuration, and compare its
    number of elements with that of the family's table."""
    config = published(name, flavor, 300)
    mapping = mapping_of(family_of(config, where="test"), config)
    ours = sum(prod(mapping.shape("hf", tensor)) for tensor in mapping.names("hf"))
    with hf_models.quiet(), torch.device("meta"):
        known = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(known)
    theirs = sum(tensor.numel() for tensor in model.state_dict().values())
    twice = known.tie_word_embeddings * prod(mapping.shape("native", "tok_embeddings.weight"))
    assert theirs - twice == ours


@pytest.mark.parametrize("name", TYPES)
def test_a_model_name_is_checked_against_config_json(name: str, tmp_path: Path) -> None:
    """Method: pass `--model-name` with a `config.json` of another family. An unknown name or flavor
    is refused with a list of the known ones."""
    other = "gemma2" if name != "gemma2" else "llama"
    folder = tmp_path / other
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": other}))
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2)}
    save_folder(tmp_path / "hf", {"model_type": other}, tensors)
    with pytest.raises(MismatchError, match=f"of different families:\n  model_type is {other}"):
        plan(str(tmp_path / "hf"), ConvertOptions(to="dcp", model_name=name))
    with pytest.raises(UsageError) as raised:
        plan(str(tmp_path / "hf"), ConvertOptions(to="dcp", model_name=name, model_flavor="9T"))
    assert all(flavor in str(raised.value) for flavor in flavors_of(name))
    with pytest.raises(UsageError) as raised:
        plan(str(tmp_path / "hf"), ConvertOptions(to="dcp", model_name="gpt5"))
    assert all(known in str(raised.value) for known in TYPES)


@pytest.mark.parametrize(
    ("name", "flavor"),
    [("qwen3", "0.6B"), ("deepseek_v3", "671B"), ("gpt_oss", "20b"), ("llama4", "17bx16e")],
)
def test_a_flavor_of_another_size_is_refused(name: str, flavor: str, tmp_path: Path) -> None:
    """Method: change one of several sizes in the `config.json` of a flavor (nested for Llama 4)."""
    config = published(name, flavor, 0)
    if name == "llama4":
        config = {"model_type": "llama4", "text_config": config}
    inner = config.get("text_config", config)
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2)}
    folder = save_folder(tmp_path / "hf", config, tensors)
    options = ConvertOptions(to="dcp", model_name=name, model_flavor=flavor)
    with pytest.raises(MismatchError, match="does not fit"):
        plan(str(folder), options)
    for key in ("head_dim", "kv_lora_rank", "num_local_experts", "num_hidden_layers"):
        if key in inner and (name, key) != ("deepseek_v3", "head_dim"):
            changed = {"text_config": {**inner, key: 3}} if name == "llama4" else {key: 3}
            (folder / "config.json").write_text(json.dumps({**config, **changed}))
            with pytest.raises(MismatchError, match="of different models"):
                plan(str(folder), options)


def test_a_published_flavor_replaces_a_missing_config_json(tmp_path: Path) -> None:
    """Method: export TorchTitan's small DeepSeek from weights without `config.json`."""
    config = published("deepseek_v3", "debugmodel", 0)
    source = save_folder(tmp_path / "hf", config, hf_tensors(config))
    (source / "config.json").unlink()
    options = ConvertOptions(to="hf", model_name="deepseek_v3", model_flavor="debugmodel")
    assert plan(str(source), options).config == config
