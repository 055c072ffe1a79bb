"""Rules `theirs=ours` that give tensors other names."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from holdfast.errors import UsageError
from holdfast.format.components import OUTER_WRAPPER, WRAPPERS

_LEADING = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)}|{OUTER_WRAPPER}|base_model\.model)\.)+")
_WITHIN = re.compile(rf"(.*?)\.((?:(?:{'|'.join(WRAPPERS)})\.)+)")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)", re.ASCII)

_SUGGESTED_MAX = 8


def parse(rule: str, option: str) -> tuple[re.Pattern[str], str]:
    """Parse a rule into a pattern and its replacement.

    >>> parse("module.=", "--rename") == parse("module=", "--rename")
    True

    Raises:
        UsageError: `rule` is malformed. The message names `option`.
    """
    theirs, equals, ours = rule.partition("=")
    # A rule matches whole parts of a name. A dot at the end of a part makes no difference.
    theirs, ours = theirs.removesuffix("."), ours.removesuffix(".")
    if not equals or not theirs or theirs.count("{}") != ours.count("{}"):
        raise UsageError(
            f"`{option}` must have rules `theirs=ours`, with the same number of `{{}}` on both "
            f"sides, found: {rule!r}",
            hint='such as "encoder.{}.attn=layers.{}.attention", or "model=" to drop a prefix',
        )
    pattern = r"([^.]+)".join(map(re.escape, theirs.split("{}")))
    return re.compile(rf"{pattern}(?=\.|$)"), ours


def new_names(
    names: Collection[str], rules: Sequence[str], option: str, *, key: str | None = None
) -> dict[str, str]:
    """Return the new name of every tensor, by its old name. The first rule that matches the
    beginning of the old name applies. `{}` matches one part of a name, without dots.

    `key`: key of the checkpoint that the tensors are below, for messages; the names lack it.

    Raises:
        UsageError: a rule matches no tensor, or two tensors get the same name.
    """
    parsed = [(rule, *parse(rule, option)) for rule in rules]
    used: set[str] = set()
    renamed: dict[str, str] = {}
    for name in names:
        new_name = name
        for rule, pattern, ours in parsed:
            match = pattern.match(name)
            if match is not None:
                used.add(rule)
                new_name = (ours.replace("{}", "\0") + name[match.end() :]).removeprefix(".")
                for part in match.groups():
                    new_name = new_name.replace("\0", part, 1)
                break
        renamed[name] = new_name
    seen: set[str] = set()
    for new_name in renamed.values():
        if new_name in seen:
            raise UsageError(f"`{option}` gives two tensors the name `{new_name}`")
        seen.add(new_name)
    unused = [rule for rule in rules if rule not in used]
    if unused:
        examples = ", ".join(list(names)[:3])
        hint = f"names in the checkpoint: {examples}, ..."
        if key is not None:
            hint = f"rules apply below the key `{key}`, which stays; names there: {examples}, ..."
        raise UsageError(f"`{option}`: no tensor matches {unused}", hint=hint)
    return renamed


def suggested(names: Collection[str], expected: Collection[str] = ()) -> list[str]:
    """Return rules that drop the parts of names that wrappers add. If no wrapper is found, return
    rules that lead to the names in `expected`: rules that add a missing prefix `model.`, or a rule
    that drops a common prefix.

    >>> suggested(["_orig_mod.layers.0.weight", "_orig_mod.norm.weight"])
    ['_orig_mod=']
    >>> suggested(["layers.0._orig_mod.weight"])
    ['layers.{}._orig_mod=layers.{}']
    >>> suggested(["norm.bias", "head.bias"], ["model.norm.bias", "model.head.bias"])
    ['norm=model.norm', 'head=model.head']
    >>> suggested(["net.model.norm.bias", "net.head.bias"], ["model.norm.bias", "head.bias"])
    ['net=']
    """
    rules: dict[str, None] = {}
    for name in names:
        leading = _LEADING.match(name)
        within = None if leading else _WITHIN.match(name)
        if leading:
            rules[f"{leading[0][:-1]}="] = None
        elif within:
            before = _NUMBER.sub("{}", within[1])
            rules[f"{before}.{within[2][:-1]}={before}"] = None
    if not rules and expected:
        wanted = {*expected}
        for name in names:
            first = name.partition(".")[0]
            if name not in wanted and f"model.{name}" in wanted:
                rules[f"{first}=model.{first}"] = None
        if not rules:
            rules = dict.fromkeys(_prefix_rule(names, wanted))
    return [*rules] if len(rules) <= _SUGGESTED_MAX else []


def _prefix_rule(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Return a rule that drops a prefix. Without this prefix, names that are not in `wanted`
    become names in `wanted`. Return an empty list if there is no such prefix."""
    common: set[str] | None = None
    for name in names:
        dots = () if name in wanted else re.finditer(r"\.", name)
        prefixes = {name[: dot.end()] for dot in dots if name[dot.end() :] in wanted}
        if prefixes:
            common = prefixes if common is None else common & prefixes
    return [f"{min(common, key=len)[:-1]}="] if common else []


def spelled(rules: Sequence[str]) -> str:
    """Format rules as options of `holdfast convert`."""
    return " ".join(f"--rename '{rule}'" for rule in rules)
