"""DeepSeek V2, V3 and R1: attention through low-rank latents, and experts after a few dense layers.

Axes besides `decoder_axes`: `a` rank of the query latent; `c` rank of the key-value latent; `p` the
key-value latent and the rotary part of the keys; `y` one query head; `z` one head of keys (without
their rotary part) and values; `w` one head of values; `n` shared experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.hf.families.decoder import ENDS, FEED_FORWARD, NORMS, block, experts
from holdfast.hf.family import Config, Family, count, layers
from holdfast.tensors.relation import Relation

LATENT = block("""
    attention.wkv_a.weight   | p d     | self_attn.kv_a_proj_with_mqa.weight
    attention.kv_norm.weight | c       | self_attn.kv_a_layernorm.weight
    attention.wkv_b.weight   | (h z) c | self_attn.kv_b_proj.weight
    attention.wo.weight      | d (h w) | self_attn.o_proj.weight
""")

QUERIES = block("attention.wq.weight | (h y) d | self_attn.q_proj.weight")

LATENT_QUERIES = block("""
    attention.wq_a.weight   | a d     | self_attn.q_a_proj.weight
    attention.q_norm.weight | a       | self_attn.q_a_layernorm.weight
    attention.wq_b.weight   | (h y) a | self_attn.q_b_proj.weight
""")

BIAS = block("moe.expert_bias | e | mlp.gate.e_score_correction_bias | | float32", "sparse")

SHARED = """
    moe.shared_experts.w1.weight | (n m) d | mlp.shared_experts.gate_proj.weight
    moe.shared_experts.w2.weight | d (n m) | mlp.shared_experts.down_proj.weight
    moe.shared_experts.w3.weight | (n m) d | mlp.shared_experts.up_proj.weight
"""


def _rows(config: Config) -> tuple[Relation, ...]:
    queries = LATENT_QUERIES if count(config, "q_lora_rank", default=0) else QUERIES
    sparse = (*experts(config, "sparse"), *block(SHARED, "sparse"))
    return (*ENDS, *NORMS, *LATENT, *queries, *block(FEED_FORWARD, "dense"), *sparse)


def _axes(config: Config) -> dict[str, Sequence[int]]:
    latent, rotated = count(config, "kv_lora_rank"), count(config, "qk_rope_head_dim")
    plain, value = count(config, "qk_nope_head_dim"), count(config, "v_head_dim")
    sizes = {
        "a": count(config, "q_lora_rank", default=0),
        "c": latent,
        "p": latent + rotated,
        "y": plain + rotated,
        "z": plain + value,
        "w": value,
        "n": count(config, "n_shared_experts"),
    }
    num_dense, every = count(config, "first_k_dense_replace"), layers(config)
    ranges = {axis: range(size) for axis, size in sizes.items()}
    return {**ranges, "dense": every[:num_dense], "sparse": every[num_dense:]}


DEEPSEEK_V2 = Family(("deepseek_v2",), _rows, _axes)
DEEPSEEK_V3 = Family(("deepseek_v3",), lambda config: (*_rows(config), *BIAS), _axes)
