"""All families, with one table each. Other packages add families by the entry point
`holdfast.families`, or by `register_family`."""

from __future__ import annotations

import re
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
"""Group of the entry points by which other packages add families. The name of an entry point is a
`model_type`, its object a `Family`."""

_OTHER_HEAD = re.compile(r"(?<!LMHead)Model|\w+For(?!CausalLM|ConditionalGeneration)\w+")
"""Pattern for classes of transformers that have no language model's head, or another head."""

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def register_family(family: Family) -> None:
    """Add a family to those of this process.

    Raises:
        UsageError: `family` is not a `Family`, or one of its model types has a family already.
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


def table_of(config: Config) -> Family | None:
    """Return the family whose table describes the tensors of a configuration.

    None: no family has the model type, or `architectures` names a class without a language model's
    head, such as a classifier. The tensors then keep their names.
    """
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    if isinstance(first, str) and re.search(rf"(?:{_OTHER_HEAD.pattern})$", first):
        return None
    return _registered(config)


def no_table(config: Config) -> str:
    """Return a note on tensors that keep their names, for a configuration without a table."""
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    kind = kind or config.get("_class_name")  # The key of diffusers.
    return f"no table has the names of {str(kind)[:100]!r}: the tensors keep theirs"


def family_of(config: Config, *, where: str) -> Family:
    """Return the family of a configuration. `where` names its file in errors, with backticks."""
    family = _registered(config)
    if family is None:
        raise FormatError(
            f"{where} has an unsupported model_type: {shortened(config.get('model_type'))}",
            hint=f"supported: {', '.join(sorted(_BY_TYPE))}; docs/families.md shows how to add one",
        )
    return family


def _registered(config: Config) -> Family | None:
    model_type = str(config.get("model_type"))
    if model_type not in _BY_TYPE:
        # Search other packages only now, since reading the metadata of all packages takes long.
        for entry_point in entry_points(group=GROUP, name=model_type):
            register_family(entry_point.load())
    return _BY_TYPE.get(model_type)
