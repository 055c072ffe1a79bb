"""Check that tensors match one side of a mapping, and list every difference."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from holdfast import spelling
from holdfast.errors import MismatchError, UsageError
from holdfast.format.region import Region
from holdfast.hf.dialects import is_balance
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import TensorInfo, Tensors
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.numbers import Array, is_packed
from holdfast.tensors.relation import SideName

LISTED_MAX = 50
"""Most lines in one error."""

BLOCK_BYTES = 16 << 20
"""Bytes of each tensor compared at a time."""

HINT = "check that the configuration belongs to these weights"

DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|freqs_cis|rope\.(freqs|cache))")
"""Names of buffers that are computed from the configuration. Some writers save them."""

_HEADS = ("lm_head.weight", "output.weight")
"""Suffixes of the names of a language model's head."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def skipped(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that match a `--skip` pattern."""
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise UsageError(f"`--skip {pattern}` matches no tensor", hint="use * and ? as in `ls`")
        found |= matching
    return found


def check_fit(
    tensors: Tensors,
    mapping: TensorMapping,
    side: SideName,
    *,
    where: str,
    config_from: str,
    hint: str = HINT,
) -> list[str]:
    """Check that `tensors` are exactly the tensors of one side of `mapping`. All differences are
    listed in one error. Returns notes for the user on tensors that are ignored.

    `where`: path of the weights, for messages. `config_from`: origin of the configuration, for
    messages.
    """
    infos, aliases = tensors.infos, mapping.aliases[side]
    derived = [name for name in infos if DERIVED.fullmatch(name)]
    balance = _unmapped_balances(infos, mapping, side)
    wrong = [
        f"`{name}` is not zero, and Hugging Face has no tensor for it"
        for name in sorted(balance)
        if _bits(tensors.read(name, Region.whole(infos[name].shape))).any()
    ]
    wrong += differences(infos, mapping, side, config_from)
    if not wrong:
        wrong += [
            f"`{name}` and `{first}` differ, but {config_from} ties them"
            for name, first in aliases.items()
            if name in infos and not _same(tensors, name, first)
        ]
    if wrong:
        raise MismatchError(
            f"`{where}` does not fit {config_from}, {len(wrong)} differences:{listed(wrong)}",
            hint=hint,
        )
    notes = {
        "buffers that follow from the configuration": derived,
        "biases that balance experts, all zero": balance,
    }
    return [f"left out {len(names)} {kind}" for kind, names in notes.items() if names]


def differences(
    infos: Mapping[str, TensorInfo], mapping: TensorMapping, side: SideName, config_from: str
) -> list[str]:
    """Compare tensors with one side of a mapping. Return one line for each tensor that is missing,
    has another shape, is quantized, or is unexpected."""
    names = mapping.names(side)
    lines = [f"`{name}` is missing" for name in names if name not in infos]
    for name in names:
        if name in infos and infos[name].shape != mapping.shape(side, name):
            found, expected = list(infos[name].shape), list(mapping.shape(side, name))
            lines.append(f"`{name}` has shape {found}, expected {expected}")
        elif name in infos and is_packed(infos[name].dtype):
            lines.append(f"`{name}` is {infos[name].dtype}, expected floats of 16 bits or more")
    known = {*names, *mapping.aliases[side], *_unmapped_balances(infos, mapping, side)}
    unexpected = [name for name in infos if name not in known and not DERIVED.fullmatch(name)]
    return [*lines, *_unexpected(unexpected, names, config_from)]


def check_exportable(
    infos: Mapping[str, TensorInfo], mapping: TensorMapping, side: SideName
) -> None:
    """Check that the tensors of a live model are those of its configuration. Raises a MismatchError
    that lists all differences."""
    wrong = differences(infos, mapping, side, "the configuration")
    if wrong:
        raise MismatchError(
            f"the model cannot be exported:{listed(wrong)}",
            hint="check that the `config.json` of the export belongs to this model",
        )


def listed(lines: Sequence[str]) -> str:
    """Return lines indented for an error. If there are many, those that differ only in the number
    of a layer or expert are merged, and only the first are shown."""
    shown = lines if len(lines) <= LISTED_MAX else list(_merged(lines))
    return spelling.listed(shown, LISTED_MAX)


def _unmapped_balances(names: Collection[str], mapping: TensorMapping, side: SideName) -> set[str]:
    """Return the names of biases that balance experts, if the mapping has no Hugging Face tensor
    for them."""
    balance = {name for name in names if is_balance(name)} if side == "native" else set()
    return balance - {*mapping.names(side)}


def _merged(lines: Sequence[str]) -> Iterator[str]:
    """Merge lines that differ only in the number of an expert, then lines that differ only in the
    number of a layer.

    >>> [*_merged([f"`layers.{n}.norm` is missing" for n in (2, 3, 4, 9)])]
    ['`layers.{2-4,9}.norm` is missing']
    """
    for pattern in (_EXPERT, _LAYER):
        numbers_by_line: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            match = pattern.search(line)
            start, stop = match.span(1) if match else (len(line), len(line))
            numbers = numbers_by_line.setdefault((line[:start], line[stop:]), [])
            if match:
                numbers.append(int(match[1]))
        lines = [
            before + _runs(numbers) + after for (before, after), numbers in numbers_by_line.items()
        ]
    yield from lines


def _runs(numbers: Sequence[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spelled = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return "{" + ",".join(spelled) + "}"


def _same(tensors: Tensors, one: str, other: str) -> bool:
    """Return whether two tensors have the same bits."""
    first, second = tensors.infos[one], tensors.infos[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        np.array_equal(_bits(tensors.read(one, region)), _bits(tensors.read(other, region)))
        for region in blocks(first.shape, 4, BLOCK_BYTES)
    )


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unexpected(unexpected: Sequence[str], names: Sequence[str], config_from: str) -> Iterator[str]:
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    is_tied = not any(name.endswith(_HEADS) for name in names)
    for name in unexpected:
        match = _LAYER.search(name)
        if match and int(match[1]) not in layers:
            yield f"`{name}` is beyond the {len(layers)} layers of {config_from}"
        elif is_tied and name.endswith(_HEADS):
            yield f"`{name}` is unexpected: {config_from} ties the output to the embedding"
        else:
            yield f"`{name}` is unexpected"
