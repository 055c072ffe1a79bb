"""Values that are not tensors: as `torch.save` writes them, read back without running code."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from holdfast.errors import FormatError, UsageError


def encode_value(name: str, value: Any) -> bytes:
    """The container of a value, as stock DCP keeps it.

    Raises:
        UsageError: the value could be read back only by running code that the checkpoint names.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PicklingError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"`{name}` is a {type(value).__module__}.{type(value).__qualname__}, "
            f"which cannot be read back safely",
            hint="keep tensors and plain values (numbers, strings, bytes, lists, dicts, tuples) in "
            "a checkpoint, and rebuild the object from them in `load_state_dict`",
        ) from error
    return buffer.getvalue()


def decode_value(name: str, container: bytes, *, where: str) -> Any:
    """The value in a container.

    Raises:
        FormatError: the container is broken, or names code to be run.
    """
    try:
        return torch.load(io.BytesIO(container), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        named = next((line.strip() for line in reason if "GLOBAL" in line), reason[0])
        raise FormatError(
            f"`{where}`: value `{name}` cannot be read without running code: {named}",
            hint=f'leave it out: `checkpoint.exclude_from_loading = ["{name.split(".")[0]}"]`',
        ) from error
