"""The values of a checkpoint, which are not tensors: read, checked, and spelled for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from holdfast.catalog.open_any import OpenCheckpoint
from holdfast.catalog.source import read_value
from holdfast.errors import FormatError
from holdfast.format import container
from holdfast.format.manifest import Span, ValueEntry

MEMBERS_MAX = 100_000
"""Of one value that is printed as JSON."""


def below(seen: OpenCheckpoint, name: str) -> list[str]:
    """The values of that name, or whose names begin with it; none where no name is given."""
    values = seen.manifest.values
    if not name:
        return []
    return [name] if name in values else [one for one in values if one.startswith(f"{name}.")]


def spelled(seen: OpenCheckpoint, names: Sequence[str]) -> Iterator[str]:
    """Each value as Python writes it, or why it cannot be shown.

    Raises:
        DamagedError: bytes that are not those that were written.
    """
    for value in _read(seen, names):
        yield str(value) if isinstance(value, FormatError) else container.spelled(value)


def as_json(seen: OpenCheckpoint, names: Sequence[str]) -> dict[str, Any]:
    """Each value by its name; what JSON has not is text.

    Raises:
        DamagedError: bytes that are not those that were written.
    """
    return dict(zip(names, map(_converted, _read(seen, names)), strict=True))


def _converted(value: object) -> Any:
    if isinstance(value, FormatError):
        return value.what
    try:
        return container.as_json(value, MEMBERS_MAX)
    except FormatError as error:
        return error.what


def _read(seen: OpenCheckpoint, names: Sequence[str]) -> Iterator[object]:
    """The values; in the place of one that is no value of torch's, the error that says so."""
    known: dict[tuple[str, Span], object] = {}
    for name in names:
        entry = seen.manifest.values[name]
        place = entry.file, entry.item
        # Equal values of a step share a container; those of a `.pt` file are parts of one.
        if place not in known or seen.format == "torch":
            known[place] = _read_one(seen, name, entry)
        yield known[place]


def _read_one(seen: OpenCheckpoint, name: str, entry: ValueEntry) -> object:
    source = seen.source
    where = f"{source.url}/{entry.file}"
    try:
        if seen.format == "torch":
            key = source.key(entry.file)
            fetch = partial(_fetch, seen, key)
            nbytes = source.store.size(key)
            return container.read_member(fetch, nbytes, entry.path, where=where)
        return container.read_value(read_value(source, name, entry), where=where)
    except FormatError as error:
        return error


def _fetch(seen: OpenCheckpoint, key: str, offset: int, nbytes: int) -> bytes:
    return seen.source.store.read(key, offset, offset + nbytes)
