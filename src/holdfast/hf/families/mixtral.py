"""Mixtral: Mistral with experts."""

from __future__ import annotations

from holdfast.hf.families.decoder import ENDS, NORMS, block, experts
from holdfast.hf.families.llama import ATTENTION
from holdfast.hf.family import FUSED_EXPERTS, Config, Family
from holdfast.tensors.relation import Relation

EXPERTS = block("""
    moe.router.gate.weight | e d   | block_sparse_moe.gate.weight
    moe.experts.w1         | e m d | block_sparse_moe.experts.{e}.w1.weight | m d
    moe.experts.w2         | e d m | block_sparse_moe.experts.{e}.w2.weight | d m
    moe.experts.w3         | e m d | block_sparse_moe.experts.{e}.w3.weight | m d
""")


def _rows(config: Config) -> tuple[Relation, ...]:
    sparse = experts(config, "l") if config.get(FUSED_EXPERTS) else EXPERTS
    return (*ENDS, *NORMS, *ATTENTION, *sparse)


MIXTRAL = Family(("mixtral",), _rows)
