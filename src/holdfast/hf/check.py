"""Do these tensors fit that table? Every difference is listed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from holdfast.errors import MismatchError, UsageError
from holdfast.format.region import Region
from holdfast.hf.dialects import is_balance
from holdfast.tensors.blocks import blocks
from holdfast.tensors.lazy import TensorInfo, Tensors
from holdfast.tensors.mapping import SideName, TensorMapping

LISTED_MAX = 50

BLOCK_BYTES = 16 << 20

DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|freqs_cis|rope\.(freqs|cache))")
"""Buffers that follow from the configuration, and that some writers keep all the same."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def skipped(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """The names that somebody asked to leave out.

    Raises:
        UsageError: a pattern that none of them matches.
    """
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise UsageError(f"`--skip {pattern}` matches no tensor", hint="it is as in `ls`: * ?")
        found |= matching
    return found


def check_fit(
    tensors: Tensors,
    mapping: TensorMapping,
    side: SideName,
    *,
    where: str,
    said_by: str,
) -> list[str]:
    """Make sure that these are the tensors of one side, all and no others. Returns notes.

    `said_by` names where the sizes come from.

    Raises:
        MismatchError: listing all that are missing, unknown or of another shape, and second names
            whose tensors differ.
    """
    held, aliases = tensors.held, mapping.aliases[side]
    derived = [name for name in held if DERIVED.fullmatch(name)]
    balance = _biases_left_out(held, mapping, side)
    used = sorted(name for name in balance if _bits(tensors.read(name, _whole(held[name]))).any())
    wrong = [f"`{name}` is not zero, and the hub has no place for it" for name in used]
    wrong += differences(held, mapping, side, said_by)
    if not wrong:
        wrong += [
            f"`{name}` and `{first}` differ, and {said_by} ties them"
            for name, first in aliases.items()
            if name in held and not same(tensors, name, first)
        ]
    if wrong:
        raise MismatchError(
            f"`{where}` does not fit, {len(wrong)} differences:{listed(wrong)}",
            hint="is the configuration the one of these weights? `--skip 'PATTERN'` leaves out "
            "tensors that are known and not wanted",
        )
    notes = {
        "buffers that follow from the configuration": derived,
        "biases that balance experts, all zero": balance,
    }
    return [f"left out {len(found)} {what}" for what, found in notes.items() if found]


def differences(
    held: Mapping[str, TensorInfo], mapping: TensorMapping, side: SideName, said_by: str
) -> list[str]:
    """Tensors of one side that are missing, of another shape, or not known: a line each."""
    names = mapping.names(side)
    known = {*names, *mapping.aliases[side], *_biases_left_out(held, mapping, side)}
    unknown = [name for name in held if name not in known and not DERIVED.fullmatch(name)]
    return [
        *_missing(held, names),
        *_misshapen(held, mapping, side, said_by),
        *_unknown(unknown, names, said_by),
    ]


def listed(lines: Sequence[str]) -> str:
    """Many lines for an error, indented below it."""
    shown = lines if len(lines) <= LISTED_MAX else list(_together(lines))
    more = len(shown) - LISTED_MAX
    last = [f"... and {more} more"] if more > 0 else []
    return "".join(f"\n  {line}" for line in (*shown[:LISTED_MAX], *last))


def _biases_left_out(held: Collection[str], mapping: TensorMapping, side: SideName) -> set[str]:
    """The biases that balance experts, where the hub has no place for them."""
    balance = {name for name in held if is_balance(name)} if side == "native" else set()
    return balance - {*mapping.names(side)}


def _together(lines: Sequence[str]) -> Iterator[str]:
    """What is said of one tensor after another that differ in the number of an expert, then of a
    layer, said of all of them at once.

    >>> [*_together([f"`layers.{n}.norm` is missing" for n in (2, 3, 4, 9)])]
    ['`layers.{2-4,9}.norm` is missing']
    """
    for place in (_EXPERT, _LAYER):
        found: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            number = place.search(line)
            start, stop = number.span(1) if number else (len(line), len(line))
            found.setdefault((line[:start], line[stop:]), []).extend(
                [int(number[1])] if number else []
            )
        lines = [before + _runs(numbers) + after for (before, after), numbers in found.items()]
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


def same(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors hold the same bits."""
    first, second = tensors.held[one], tensors.held[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(
        np.array_equal(_bits(tensors.read(one, region)), _bits(tensors.read(other, region)))
        for region in blocks(first.shape, 4, BLOCK_BYTES)
    )


def _whole(held: TensorInfo) -> Region:
    return Region.whole(held.shape)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _missing(held: Mapping[str, TensorInfo], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name not in held:
            yield f"`{name}` is missing"


def _misshapen(
    held: Mapping[str, TensorInfo], mapping: TensorMapping, side: SideName, said_by: str
) -> Iterator[str]:
    for name in mapping.names(side):
        if name in held and held[name].shape != mapping.shape(side, name):
            wanted = list(mapping.shape(side, name))
            yield f"`{name}` is {list(held[name].shape)}, {said_by} makes it {wanted}"


def _unknown(unknown: Sequence[str], names: Sequence[str], said_by: str) -> Iterator[str]:
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    for name in unknown:
        match = _LAYER.search(name)
        if match and int(match[1]) not in layers:
            yield f"`{name}` is beyond the layers that {said_by} has: {len(layers)}"
        elif name.endswith(("lm_head.weight", "output.weight")):
            yield f"`{name}` is there, {said_by} ties the output to the embedding"
        else:
            yield f"`{name}` is not known"
