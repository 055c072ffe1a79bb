"""Phi 3 and 4: one tensor for queries, keys and values, and one for gate and up projections."""

from __future__ import annotations

from holdfast.hf.families.decoder import ENDS, NORMS, block
from holdfast.hf.family import Family

FUSED = block("""
    attention.wq.weight           | (h x) d | self_attn.qkv_proj.weight | *(h x)+(k x)+(k x) d
    attention.wk.weight           | (k x) d | self_attn.qkv_proj.weight | (h x)+*(k x)+(k x) d
    attention.wv.weight           | (k x) d | self_attn.qkv_proj.weight | (h x)+(k x)+*(k x) d
    attention.wo.weight           | d (h x) | self_attn.o_proj.weight
    feed_forward.{g:w1,w3}.weight | f d     | mlp.gate_up_proj.weight   | (g f) d
    feed_forward.w2.weight        | d f     | mlp.down_proj.weight
""")

PHI3 = Family(("phi3",), lambda _: (*ENDS, *NORMS, *FUSED))
