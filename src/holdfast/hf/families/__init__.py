"""All families, one table each."""

from __future__ import annotations

from reprlib import repr as shortened

from holdfast.errors import FormatError
from holdfast.hf.families import deepseek_v3, gemma, gpt_oss, llama, llama4, mixtral, phi3, qwen
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
    """Return the family of a configuration. `where` names its file in errors, with backticks."""
    family = _BY_TYPE.get(str(config.get("model_type")))
    if family is None:
        raise FormatError(
            f"{where} has an unsupported model_type: {shortened(config.get('model_type'))}",
            hint=f"supported: {', '.join(sorted(_BY_TYPE))}; docs/families.md shows how to add one",
        )
    return family
