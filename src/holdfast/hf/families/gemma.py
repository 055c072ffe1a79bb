"""Gemma 2 and 3: norms before and after attention and feed-forward.

Native norm weights are stored minus one, like those of Hugging Face.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from holdfast.hf.families.decoder import ATTENTION, ENDS, FEED_FORWARD, HEAD_NORMS, block
from holdfast.hf.family import Family

NORMS = block("""
    attention_norm.weight      | d | input_layernorm.weight
    post_attention_norm.weight | d | post_attention_layernorm.weight
    ffn_norm.weight            | d | pre_feedforward_layernorm.weight
    post_ffn_norm.weight       | d | post_feedforward_layernorm.weight
""")

ROWS = (*ENDS, *NORMS, *ATTENTION, *block(FEED_FORWARD))
DEFAULTS: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}

GEMMA2 = Family(("gemma2",), lambda _: ROWS, defaults=DEFAULTS)
GEMMA3 = Family(("gemma3_text",), lambda _: (*ROWS, *HEAD_NORMS), defaults=DEFAULTS)
GEMMA3_IN_A_LARGER_MODEL = replace(
    GEMMA3,
    model_types=("gemma3",),
    prefix="language_model.",
    alone=("gemma3_text", "Gemma3ForCausalLM"),
)
