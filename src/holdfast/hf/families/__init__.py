"""The families: one table each."""

from __future__ import annotations

from reprlib import repr as shortened

from holdfast.errors import FormatError
from holdfast.hf.families import (
    deepseek_v3,
    gemma,
    gpt_oss,
    llama,
    llama4,
    mixtral,
    phi3,
    qwen,
)
from holdfast.hf.family import Config, Family

FAMILIES: tuple[Family, ...] = (
    llama.LLAMA,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    mixtral.MIXTRAL,
    deepseek_v3.DEEPSEEK_V2,
    deepseek_v3.DEEPSEEK_V3,
    gpt_oss.GPT_OSS,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gemma.GEMMA3_IN_A_LARGER_MODEL,
    phi3.PHI3,
    llama4.LLAMA4,
    llama4.LLAMA4_IN_A_LARGER_MODEL,
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(config: Config, *, where: str) -> Family:
    """The family that a `config.json` is of.

    Raises:
        FormatError: none that is known.
    """
    found = _BY_TYPE.get(str(config.get("model_type")))
    if found is None:
        named = shortened(config.get("model_type"))
        raise FormatError(
            f"`{where}` has model_type {named}, whose tensors are not known",
            hint=f"known: {', '.join(sorted(_BY_TYPE))}; docs/families.md shows how to add one",
        )
    return found
