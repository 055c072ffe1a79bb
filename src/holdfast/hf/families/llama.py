"""Llama 2, 3, 3.1, 3.2 and 3.3, and Mistral.

Rotary embeddings rotate pairs of rows in each head. Meta pairs adjacent rows. Hugging Face pairs
row i with row i + x/2. So the two have the rows of `wq` and `wk` in different orders within each
head.
"""

from __future__ import annotations

from holdfast.hf.families.decoder import DENSE, WO_BIAS, block
from holdfast.hf.family import Config, Family, flag
from holdfast.tensors.relation import Relation

ATTENTION = block("""
    attention.wq.weight | (h r s) d | self_attn.q_proj.weight | (h s r) d
    attention.wk.weight | (k r s) d | self_attn.k_proj.weight | (k s r) d
    attention.wv.weight | (k x) d   | self_attn.v_proj.weight
    attention.wo.weight | d (h x)   | self_attn.o_proj.weight
""")

QKV_BIASES = block("""
    attention.wq.bias | (h r s) | self_attn.q_proj.bias | (h s r)
    attention.wk.bias | (k r s) | self_attn.k_proj.bias | (k s r)
    attention.wv.bias | (k x)   | self_attn.v_proj.bias
""")

FEED_FORWARD_BIASES = block("""
    feed_forward.w1.bias | f | mlp.gate_proj.bias
    feed_forward.w2.bias | d | mlp.down_proj.bias
    feed_forward.w3.bias | f | mlp.up_proj.bias
""")


def _rows(config: Config) -> tuple[Relation, ...]:
    biases = (*QKV_BIASES, *WO_BIAS) if flag(config, "attention_bias") else ()
    mlp_biases = FEED_FORWARD_BIASES if flag(config, "mlp_bias") else ()
    return (*DENSE, *ATTENTION, *biases, *mlp_biases)


LLAMA = Family(("llama", "mistral"), _rows)
