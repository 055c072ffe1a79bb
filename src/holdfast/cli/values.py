"""Read and verify the values in a checkpoint, and convert them to text or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from holdfast.catalog.open_any import OpenCheckpoint
from holdfast.catalog.source import read_value
from holdfast.errors import FormatError
from holdfast.format import container
from holdfast.format.manifest import Span, ValueEntry
from holdfast.format.structure import types_by_path, with_types

MEMBERS_MAX = 100_000
"""Maximum number of members of one value to print as JSON."""


def below(checkpoint: OpenCheckpoint, name: str) -> list[str]:
    """Return a list: `name` if it names a value, else the names of all values below it. It is empty
    if `name` is empty."""
    values = checkpoint.manifest.values
    if not name:
        return []
    return [name] if name in values else [value for value in values if value.startswith(f"{name}.")]


def spelled(value: object) -> str:
    """Format a result of `read` as text: a value like `repr`, or the message of the error."""
    return str(value) if isinstance(value, FormatError) else container.spelled(value)


def as_json(value: object) -> Any:
    """Convert a result of `read` to types of JSON. Values that JSON cannot express become text."""
    if isinstance(value, FormatError):
        return value.what
    try:
        return container.as_json(value, MEMBERS_MAX)
    except FormatError as error:
        return error.what


def read(checkpoint: OpenCheckpoint, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    """Yield each name with its value, or with the error that says why it cannot be decoded. Numpy
    scalars are numbers of Python.

    Raises:
        DamagedError: the bytes of a value do not match their checksum.
    """
    decoded: dict[tuple[str, Span], object] = {}
    types = types_by_path(checkpoint.manifest.structure)
    for name in names:
        entry = checkpoint.manifest.values[name]
        key = entry.file, entry.item
        if name in checkpoint.values:
            yield name, checkpoint.values[name]
            continue
        # Equal values share a container, so decode it once.
        if key not in decoded:
            decoded[key] = _read_one(checkpoint, name, entry)
        value = decoded[key]
        yield name, with_types(value, types[entry.path]) if entry.path in types else value


def _read_one(checkpoint: OpenCheckpoint, name: str, entry: ValueEntry) -> object:
    source = checkpoint.source
    where = f"{source.url}/{entry.file}"
    try:
        return container.read_value(read_value(source, name, entry), where=where)
    except FormatError as error:
        return error
