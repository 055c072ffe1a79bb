"""Where the chunks of a tensor lie, drawn with letters."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase

from holdfast.format.region import Region

WIDTH_MAX, HEIGHT_MAX = 48, 12

LETTERS = ascii_uppercase + ascii_lowercase

OTHERS = "#"
"""Stands for every chunk past the last letter."""


def letter(index: int) -> str:
    """What a chunk is drawn with."""
    return LETTERS[index] if index < len(LETTERS) else OTHERS


def draw(shape: Sequence[int], regions: Sequence[Region]) -> list[str]:
    """The tensor as a box of letters, one for each region, along the two dims that are cut most;
    what lies along the others is drawn at their first element.

    >>> draw((4, 4), [Region((0, 0), (2, 4)), Region((2, 0), (4, 2)), Region((2, 2), (4, 4))])
    ['AAAA', 'AAAA', 'BBCC', 'BBCC']
    """
    if 0 in shape:
        return []
    down, across = _dims(shape, regions)
    height = 1 if down is None else min(shape[down], HEIGHT_MAX)
    width = 1 if across is None else min(shape[across], WIDTH_MAX)
    rows = []
    for row in range(height):
        line = ""
        for column in range(width):
            at = [0] * len(shape)
            if down is not None:
                at[down] = _middle(row, height, shape[down])
            if across is not None:
                at[across] = _middle(column, width, shape[across])
            line += _letter_at(at, regions)
        rows.append(line)
    return rows


def _dims(shape: Sequence[int], regions: Sequence[Region]) -> tuple[int | None, int | None]:
    """The dims to draw down and across."""
    if len(shape) < 2:
        return None, 0 if shape else None
    cuts = [len({region.start[dim] for region in regions}) for dim in range(len(shape))]
    first, second = sorted(sorted(range(len(shape)), key=lambda dim: -cuts[dim])[:2])
    return first, second


def _middle(cell: int, cells: int, size: int) -> int:
    return (2 * cell + 1) * size // (2 * cells)


def _letter_at(at: Sequence[int], regions: Sequence[Region]) -> str:
    for index, region in enumerate(regions):
        if all(a <= i < b for a, i, b in zip(region.start, at, region.stop, strict=True)):
            return letter(index)
    return "."
