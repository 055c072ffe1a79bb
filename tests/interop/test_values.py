"""Native models with the values of a `config.json`, compared with transformers models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_models
from extent import every
from holdfast.comm import all_ranks
from holdfast.errors import MismatchError
from holdfast.hf.flavors import ExpertFlavor, Flavor, config_of
from holdfast.hf.load import load_folder
from holdfast.hf.values import value_differences, with_values
from holdfast.state.objects import StateTree
from holdfast.trainer.model import Transformer

POSITIONS = 32
"""Positions before any scaling: fewer than the tokens of the test, so that all scalings differ."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}

ROPES: Mapping[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    "yarn with all values": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "truncate": False,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
    },
    "yarn with a factor of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "attention_factor": 1.3,
    },
}
"""Rotary parameters of transformers, by name of the test."""

OTHERS: Mapping[str, dict[str, Any]] = {
    "epsilon": {"rms_norm_eps": 1e-3},
    "narrow heads": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
}

EXPERTS: Mapping[str, dict[str, Any]] = {
    "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "three experts": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "weights as they are": {"num_experts_per_tok": 2, "norm_topk_prob": False},
}


def cases() -> list[Any]:
    named: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, rope in ROPES.items():
        original = {"original_max_position_embeddings": POSITIONS}
        has_original = rope["rope_type"] in ("llama3", "yarn")
        values = {"rope_parameters": {**rope, **(original if has_original else {})}}
        positions = 8 * POSITIONS if has_original else POSITIONS
        named[f"llama-{name}"] = "llama3", {**values, "max_position_embeddings": positions}
        if name in ("theta", "yarn"):
            named[f"qwen3_moe-{name}"] = named[f"llama-{name}"][0], {}
            named[f"qwen3_moe-{name}"] = "qwen3_moe", named[f"llama-{name}"][1]
    named |= {f"llama-{name}": ("llama3", values) for name, values in OTHERS.items()}
    named |= {f"qwen3_moe-{name}": ("qwen3_moe", values) for name, values in OTHERS.items()}
    named |= {f"qwen3_moe-{name}": ("qwen3_moe", values) for name, values in EXPERTS.items()}
    return [pytest.param(*value, id=name.replace(" ", "-")) for name, value in named.items()]


FLAVORS = {
    "llama3": Flavor(64, 2, 4, 2, 96, vocab_size=None),
    "qwen3_moe": Flavor(
        64,
        2,
        4,
        2,
        48,
        vocab_size=None,
        rope_halves=True,
        head_norm=True,
        head_width=32,
        experts=ExpertFlavor(4, 2, 48),
    ),
}
"""Small flavors whose values differ from those of every test."""


def folder_of(name: str, values: Mapping[str, Any], folder: Path) -> tuple[Any, Path]:
    """Save a random transformers model with these values. Returns the model and the folder."""
    sizes = config_of(name, FLAVORS[name], 300)
    for key in ("rope_theta", "rope_scaling", "torch_dtype", "architectures"):
        sizes.pop(key, None)
    with hf_models.quiet():
        config = transformers.AutoConfig.for_model(**{**sizes, **values})
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    return model, hf_models.save(model, folder)


@pytest.mark.parametrize(("name", "values"), every(2, cases()))
def test_a_native_model_follows_the_values_of_config_json(
    name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """G10: logits agree within 1e-5. The `config.json` that describes the followed model has the
    same values, also in the spelling of transformers 4."""
    theirs, folder = folder_of(name, values, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    flavor = with_values(FLAVORS[name], config, where="the folder")
    described = config_of(name, flavor, 300)
    assert value_differences(config, described) == []
    rope = config.pop("rope_parameters")
    older = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert with_values(FLAVORS[name], older, where="the folder") == flavor

    # A dynamic base depends on the length, which is that of the run.
    tokens = torch.randint(0, 300, (2, 2 * POSITIONS))
    ours = Transformer(flavor, vocab_size=300, seq_len=tokens.shape[1])
    ranks = all_ranks()
    load_folder(str(folder), StateTree({"model": ours}, flat="model"), ranks=ranks)
    ranks.close()
    with torch.no_grad(), hf_models.quiet():
        found, wanted = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


REFUSED: Mapping[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "rope_type": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "factor": {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
    "rope_theta": {"rope_theta": 0},
    "max_position_embeddings": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 0,
    },
    "original_max_position_embeddings": {
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}
    },
    "rms_norm_eps": {"rms_norm_eps": None},
    "sliding_window": {"model_type": "mistral", "sliding_window": 16},
    "mlp_only_layers": {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
    "num_experts_per_tok": {"model_type": "qwen3_moe", "num_experts_per_tok": 9},
}


def test_values_that_no_native_model_has_are_all_named() -> None:
    """G10. Method: each value alone, then two at once: one message has both."""
    for key, values in REFUSED.items():
        name = "qwen3_moe" if values.get("model_type") == "qwen3_moe" else "llama3"
        config = {**config_of(name, FLAVORS[name], 300), **values}
        with pytest.raises(MismatchError, match=f"the folder has values .*\n  `{key}`"):
            with_values(FLAVORS[name], config, where="the folder")
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        rope = {"rope_type": kind, "factor": 0, **LLAMA3}
        config = {**config_of("llama3", FLAVORS["llama3"], 300), "rope_scaling": rope}
        with pytest.raises(MismatchError, match="`factor` must be a number above 0, found: 0"):
            with_values(FLAVORS["llama3"], config, where="the folder")
    both = {**REFUSED["hidden_act"], **REFUSED["attention_bias"]}
    with pytest.raises(MismatchError, match=r"gelu.*\n.*attention_bias"):
        with_values(FLAVORS["llama3"], both, where="the folder")
