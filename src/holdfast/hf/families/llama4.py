"""Llama 4's language model: routed experts and a shared one in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from holdfast.hf.families.decoder import ATTENTION, ENDS, NORMS, block
from holdfast.hf.family import Config, Family, count, layers, numbers
from holdfast.tensors.relation import Relation

FEED_FORWARD = """
    feed_forward.w1.weight | u d | feed_forward.gate_proj.weight
    feed_forward.w2.weight | d u | feed_forward.down_proj.weight
    feed_forward.w3.weight | u d | feed_forward.up_proj.weight
"""

EXPERTS = """
    moe.router.gate.weight       | e d   | feed_forward.router.weight
    moe.experts.{g:w1,w3}        | e f d | feed_forward.experts.gate_up_proj | e d (g f)
    moe.experts.w2               | e d f | feed_forward.experts.down_proj    | e f d
    moe.shared_experts.w1.weight | f d   | feed_forward.shared_expert.gate_proj.weight
    moe.shared_experts.w2.weight | d f   | feed_forward.shared_expert.down_proj.weight
    moe.shared_experts.w3.weight | f d   | feed_forward.shared_expert.up_proj.weight
"""


def _rows(_: Config) -> tuple[Relation, ...]:
    feed_forward = (*block(FEED_FORWARD, "dense"), *block(EXPERTS, "sparse"))
    return (*ENDS, *NORMS, *ATTENTION, *feed_forward)


def _axes(config: Config) -> dict[str, Sequence[int]]:
    every = layers(config)
    step = count(config, "interleave_moe_layer_step", least=1)
    listed = numbers(config, "moe_layers")
    sparse = [n for n in every if (n in listed if listed is not None else (n + 1) % step == 0)]
    dense = sorted({*every} - {*sparse})
    return {"u": range(count(config, "intermediate_size_mlp")), "dense": dense, "sparse": sparse}


LLAMA4 = Family(("llama4_text",), _rows, _axes, {"head_dim": 128})
LLAMA4_IN_A_LARGER_MODEL = replace(
    LLAMA4,
    model_types=("llama4",),
    prefix="language_model.",
    alone=("llama4_text", "Llama4ForCausalLM"),
)
