"""Dialects of names, the choice between a table and own names, and the dtype of an export."""

from __future__ import annotations

import pytest

from holdfast.hf.dialects import Dialect, dialect_of
from holdfast.hf.families import table_of
from holdfast.hf.shards import shard


@pytest.mark.parametrize(
    ("names", "dialect"),
    [
        (["layers.0.attention.qkv_linear.wq.weight"], "titan"),
        (["layers.0.feed_forward.w1.weight", "lm_head.weight"], "titan"),
        (["layers.0.attention.wkv_a.weight", "lm_head.weight"], "titan"),
        (["layers.0.attention.wq.weight", "output.weight"], "meta"),
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "hf"),
        (["tok_embeddings.weight", "vision.layers.0.self_attn.q_proj.weight"], "meta"),
        (["transformer.h.0.attn.c_attn.weight", "lm_head.weight"], None),
        (["lm_head.weight", "norm.weight"], None),
    ],
)
def test_a_head_alone_is_no_sign_of_a_dialect(names: list[str], dialect: Dialect | None) -> None:
    """Method: names of each dialect, and of models of transformers with a head of the same name."""
    assert dialect_of(names) == dialect


@pytest.mark.parametrize(
    ("kind", "has_table"),
    [
        ("LlamaForCausalLM", True),
        ("LlamaModel", False),
        ("LlamaForSequenceClassification", False),
        ("MyLlamaLMHeadModel", True),
        ("Gemma3ForConditionalGeneration", True),
        (None, True),
    ],
)
def test_a_class_with_another_head_has_no_table(kind: str | None, has_table: bool) -> None:
    """Method: classes of transformers, all with a model type that has a table."""
    config = {"model_type": "llama", "architectures": None if kind is None else [kind]}
    assert (table_of(config) is not None) == has_table


def test_the_dtype_of_an_export_is_one_of_floats() -> None:
    """Method: more bytes in indices than in weights; no weights at all."""
    assert shard({"index": ("int64", (100,)), "weight": ("bfloat16", (3,))}).dtype == "bfloat16"
    assert shard({"index": ("int64", (100,))}).dtype == "float32"
