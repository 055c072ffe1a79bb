"""Relations that many families share. `holdfast.hf.family.decoder_axes` explains the letters of the
axes."""

from __future__ import annotations

from holdfast.hf.family import FUSED_EXPERTS, Config
from holdfast.tensors.relation import Relation, table


def block(rows: str, layers: str = "l") -> tuple[Relation, ...]:
    """Parse the lines of a table of relations that apply to every layer on an axis. `layers`: name
    of this axis, such as `l` for all layers, or `sparse` for those with experts."""
    return table(rows, f"layers.{{{layers}}}.", f"model.layers.{{{layers}}}.")


ENDS = table("""
    tok_embeddings.weight | v d | model.embed_tokens.weight
    norm.weight           | d   | model.norm.weight
    output.weight         | v d | lm_head.weight
""")

NORMS = block("""
    attention_norm.weight | d | input_layernorm.weight
    ffn_norm.weight       | d | post_attention_layernorm.weight
""")

ATTENTION = block("""
    attention.wq.weight | (h x) d | self_attn.q_proj.weight
    attention.wk.weight | (k x) d | self_attn.k_proj.weight
    attention.wv.weight | (k x) d | self_attn.v_proj.weight
    attention.wo.weight | d (h x) | self_attn.o_proj.weight
""")

QKV_BIASES = block("""
    attention.wq.bias | (h x) | self_attn.q_proj.bias
    attention.wk.bias | (k x) | self_attn.k_proj.bias
    attention.wv.bias | (k x) | self_attn.v_proj.bias
""")

WO_BIAS = block("attention.wo.bias | d | self_attn.o_proj.bias")

HEAD_NORMS = block("""
    attention.q_norm.weight | x | self_attn.q_norm.weight
    attention.k_norm.weight | x | self_attn.k_norm.weight
""")

FEED_FORWARD = """
    feed_forward.w1.weight | f d | mlp.gate_proj.weight
    feed_forward.w2.weight | d f | mlp.down_proj.weight
    feed_forward.w3.weight | f d | mlp.up_proj.weight
"""

EXPERTS = """
    moe.router.gate.weight | e d   | mlp.gate.weight
    moe.experts.w1         | e m d | mlp.experts.{e}.gate_proj.weight | m d
    moe.experts.w2         | e d m | mlp.experts.{e}.down_proj.weight | d m
    moe.experts.w3         | e m d | mlp.experts.{e}.up_proj.weight   | m d
"""

EXPERTS_FUSED = """
    moe.router.gate.weight  | e d   | mlp.gate.weight
    moe.experts.{g:w1,w3}   | e m d | mlp.experts.gate_up_proj | e (g m) d
    moe.experts.w2          | e d m | mlp.experts.down_proj
"""
"""Experts as transformers has them in memory from version 5 on. Some tools save them so."""


def experts(config: Config, layers: str) -> tuple[Relation, ...]:
    """Return the relations of the experts of every layer in the axis `layers`. If `fused_experts`
    is true in `config`, one Hugging Face tensor has all experts of a layer."""
    return block(EXPERTS_FUSED if config.get(FUSED_EXPERTS) else EXPERTS, layers)


DENSE = (*ENDS, *NORMS, *block(FEED_FORWARD))
"""Relations of a model without experts, except those of its attention."""
