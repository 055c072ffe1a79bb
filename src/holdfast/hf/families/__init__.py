"""All families, one table each. Other packages add theirs by the entry point `holdfast.families`,
or by `register_family`."""

from __future__ import annotations

from importlib.metadata import entry_points
from reprlib import repr as shortened

from holdfast.errors import FormatError, UsageError
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

GROUP = "holdfast.families"
"""Entry points of other packages. The name of each is a `model_type`, its object a `Family`."""

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def register_family(family: Family) -> None:
    """Add a family to those of this process.

    Raises:
        UsageError: this is no `Family`, or one of its model types has a family already.
    """
    if not isinstance(family, Family):
        raise UsageError(f"`family` must be a `Family`, found: {shortened(family)}")
    taken = [name for name in family.model_types if _BY_TYPE.get(name, family) is not family]
    if taken:
        raise UsageError(
            f"the model type `{taken[0]}` has a family already",
            hint="a family adds model types, it does not replace those of another",
        )
    _BY_TYPE.update(dict.fromkeys(family.model_types, family))


def family_of(config: Config, *, where: str) -> Family:
    """Return the family of a configuration. `where` names its file in errors, with backticks."""
    model_type = str(config.get("model_type"))
    if model_type not in _BY_TYPE:
        # Looked up only now, since reading the metadata of all packages takes long.
        for entry_point in entry_points(group=GROUP, name=model_type):
            register_family(entry_point.load())
    family = _BY_TYPE.get(model_type)
    if family is None:
        raise FormatError(
            f"{where} has an unsupported model_type: {shortened(config.get('model_type'))}",
            hint=f"supported: {', '.join(sorted(_BY_TYPE))}; docs/families.md shows how to add one",
        )
    return family
