"""Pictures of how a tensor is divided into chunks, drawn with letters."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase

from holdfast.format.region import Region

WIDTH_MAX, HEIGHT_MAX = 48, 12
"""Maximum size of a picture, in letters and lines."""

LETTERS = ascii_uppercase + ascii_lowercase

OTHERS = "#"
"""Character for each chunk whose number is too high for a letter."""


def letter(index: int) -> str:
    """Return the letter with which to draw the chunk number `index`."""
    return LETTERS[index] if index < len(LETTERS) else OTHERS


def draw(shape: Sequence[int], regions: Sequence[Region]) -> list[str]:
    """Draw a tensor as lines of letters, one letter per region.

    The picture shows the two dims with the most chunks, at index 0 of all other dims.

    >>> draw((4, 4), [Region((0, 0), (2, 4)), Region((2, 0), (4, 2)), Region((2, 2), (4, 4))])
    ['AAAA', 'AAAA', 'BBCC', 'BBCC']
    """
    if 0 in shape:
        return []
    down, across = _dims(shape, regions)
    rows = []
    for row in _middles(shape, down, HEIGHT_MAX):
        line = ""
        for column in _middles(shape, across, WIDTH_MAX):
            shown = {down: row, across: column}
            line += _letter_at([shown.get(dim, 0) for dim in range(len(shape))], regions)
        rows.append(line)
    return rows


def _dims(shape: Sequence[int], regions: Sequence[Region]) -> tuple[int | None, int | None]:
    """Return the dims to draw vertically and horizontally; None for one that the tensor lacks."""
    if len(shape) < 2:
        return None, 0 if shape else None
    cuts = [len({region.start[dim] for region in regions}) for dim in range(len(shape))]
    first, second = sorted(sorted(range(len(shape)), key=lambda dim: -cuts[dim])[:2])
    return first, second


def _middles(shape: Sequence[int], dim: int | None, cells_max: int) -> list[int]:
    """Divide a dim into at most `cells_max` cells. Return the index in the middle of each cell."""
    size = 1 if dim is None else shape[dim]
    cells = min(size, cells_max)
    return [(2 * cell + 1) * size // (2 * cells) for cell in range(cells)]


def _letter_at(index: Sequence[int], regions: Sequence[Region]) -> str:
    for number, region in enumerate(regions):
        bounds = zip(region.start, index, region.stop, strict=True)
        if all(start <= i < stop for start, i, stop in bounds):
            return letter(number)
    return "."
