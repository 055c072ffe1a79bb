"""gpt-oss: biases, attention sinks, and experts whose gate and up rows alternate (axis `g`)."""

from __future__ import annotations

from holdfast.hf.families.decoder import ATTENTION, ENDS, NORMS, QKV_BIASES, WO_BIAS, block
from holdfast.hf.family import Family

EXPERTS = block("""
    attention.sinks         | h         | self_attn.sinks
    moe.router.gate.weight  | e d       | mlp.router.weight
    moe.router.gate.bias    | e         | mlp.router.bias
    moe.experts.mlp1_weight | e (f g) d | mlp.experts.gate_up_proj | e d (f g)
    moe.experts.mlp1_bias   | e (f g)   | mlp.experts.gate_up_proj_bias
    moe.experts.mlp2_weight | e d f     | mlp.experts.down_proj    | e f d
    moe.experts.mlp2_bias   | e d       | mlp.experts.down_proj_bias
""")


GPT_OSS = Family(
    ("gpt_oss",),
    lambda _: (*ENDS, *NORMS, *ATTENTION, *QKV_BIASES, *WO_BIAS, *EXPERTS),
    lambda _: {"g": range(2)},
    {"head_dim": 64},
)
