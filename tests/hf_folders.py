"""Small Hugging Face folders, made from the table of a family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def hf_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return random tensors for all names in the family's table."""
    mapping = mapping_of(family_of(config, where="test"), config)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(mapping.shape("hf", name), generator=generator)
        for name in mapping.names("hf")
    }


def save_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], num_files: int = 1
) -> Path:
    """Write `config.json`, and the tensors to one file, or to several files with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file({**tensors}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in [*tensors][number::num_files]}
        index |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def converted(source: Path, target: Path, options: ConvertOptions) -> tuple[str, ...]:
    """Convert. Returns the notes of the plan."""
    planned = plan(str(source), options)
    convert(planned, str(target))
    return planned.notes


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all files of a folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names, dtypes and elements."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


PEFT = "base_model.model."
"""Prefix that PEFT puts before the names of the base model."""


def low_rank(base: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return random factors with PEFT's names. `ranks`: by name of the weight without `.weight`."""
    factors = {}
    for name, rank in ranks.items():
        rows, columns = base[f"{name}.weight"].shape
        factors[f"{PEFT}{name}.lora_A.weight"] = torch.randn(rank, columns)
        factors[f"{PEFT}{name}.lora_B.weight"] = torch.randn(rows, rank)
    return factors


def save_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write an adapter folder as PEFT does."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({**tensors}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
