"""Qwen 2 and 2.5, and Qwen 3 with and without experts."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.hf.families.decoder import (
    ATTENTION,
    DENSE,
    ENDS,
    FEED_FORWARD,
    HEAD_NORMS,
    NORMS,
    QKV_BIASES,
    WO_BIAS,
    block,
    experts,
)
from holdfast.hf.family import Config, Family, count, flag, layers, numbers
from holdfast.tensors.relation import Relation


def _attention(config: Config) -> tuple[Relation, ...]:
    biases = (*QKV_BIASES, *WO_BIAS) if flag(config, "attention_bias") else ()
    return (*ATTENTION, *HEAD_NORMS, *biases)


def _with_experts(config: Config) -> tuple[Relation, ...]:
    feed_forward = (*experts(config, "sparse"), *block(FEED_FORWARD, "dense"))
    return (*ENDS, *NORMS, *_attention(config), *feed_forward)


def _layers(config: Config) -> dict[str, Sequence[int]]:
    every = layers(config)
    step = count(config, "decoder_sparse_step", default=1) or 1
    dense = numbers(config, "mlp_only_layers") or frozenset()
    sparse = [layer for layer in every if layer not in dense and (layer + 1) % step == 0]
    return {"sparse": sparse, "dense": sorted({*every} - {*sparse})}


QWEN2 = Family(("qwen2",), lambda _: (*DENSE, *ATTENTION, *QKV_BIASES))
QWEN3 = Family(("qwen3",), lambda config: (*DENSE, *_attention(config)))
QWEN3_MOE = Family(("qwen3_moe",), _with_experts, _layers)
