"""Convert values of DCP's planners, which pickle and unpickle them, to and from containers."""

from __future__ import annotations

import io

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from holdfast.errors import UsageError
from holdfast.state.values import decode_value, encode_value


def container_of(item: WriteItem, planner: SavePlanner) -> bytes:
    """Return the container of a value. If the planner has its own pickling, these are the bytes
    that it has made.

    Raises:
        UsageError: reading the value would run code that the checkpoint names.
    """
    name = item.index.fqn
    if isinstance(planner, DefaultSavePlanner):
        transform = type(planner).transform_object
        if transform is DefaultSavePlanner.transform_object:
            return encode_value(name, planner.lookup_object(item.index))
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        raise UsageError(f"`{name}`: the planner gave a {type(data).__name__}, no bytes")
    container = data.getvalue()
    try:
        torch.load(io.BytesIO(container), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"`{name}`: reading it would run code that the checkpoint names: {error}",
            hint="replace it by tensors and plain values, or trust its class in every process that "
            "loads: torch.serialization.add_safe_globals([...])",
        ) from error
    return container


def for_planner(name: str, container: bytes, *, where: str) -> io.BytesIO:
    """Decode a container and pickle its value again. Planners unpickle without limits, so they must
    never get bytes that somebody else wrote.

    Raises:
        FormatError: reading the value would run code that the checkpoint names.
    """
    data = io.BytesIO()
    torch.save(decode_value(name, container, where=where), data)
    data.seek(0)
    return data
