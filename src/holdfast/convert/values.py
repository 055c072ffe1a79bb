"""Conversion of values (entries that are not tensors): the only part that needs torch."""

from __future__ import annotations

import pickle
from typing import Any

from holdfast.catalog.open_any import OpenCheckpoint
from holdfast.catalog.source import read_value
from holdfast.convert.target import Values
from holdfast.errors import FormatError, UsageError

_HINT = "`--model-only` leaves out everything but the model"


def encoded_values(checkpoint: OpenCheckpoint, *, pickled: bool) -> Values:
    """Return every value in a container of its own or, `pickled`, as a fragment of a pickle."""
    entries, source = checkpoint.manifest.values, checkpoint.source
    if checkpoint.format != "torch" and not pickled:
        return {n: (e.path, read_value(source, n, e)) for n, e in entries.items()}
    try:
        from holdfast.state.values import decode_value, encode_value
    except ImportError as error:
        raise UsageError(
            f"`{checkpoint.where}` has values that are not tensors, which need torch to be "
            f"converted; it cannot be imported: {error}",
            hint="pip install torch; or `--model-only`, which leaves out the values",
        ) from error
    if checkpoint.format == "torch":
        root = _load_torch_file(checkpoint.where)
        values = {name: _member(root, entry.path) for name, entry in entries.items()}
    else:
        values = {
            name: decode_value(
                name, read_value(source, name, entry), where=f"{source.url}/{entry.file}"
            )
            for name, entry in entries.items()
        }
    encode = _pickled if pickled else encode_value
    return {name: (entries[name].path, encode(name, value)) for name, value in values.items()}


def _pickled(name: str, value: Any) -> bytes:
    import torch

    def has_tensor(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(has_tensor, value.values()))
        if isinstance(value, list | tuple | set):
            return any(map(has_tensor, value))
        return isinstance(value, torch.Tensor)

    if has_tensor(value):
        raise UsageError(
            f"the value `{name}` has tensors inside, which cannot be written to a .pt file",
            hint=_HINT,
        )
    return pickle.dumps(value, protocol=2)


def _load_torch_file(path: str) -> Any:
    """Load the objects of a `.pt` file. Its tensors stay on disk."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"the values of `{path}` cannot be read: {reason[0]}", hint=_HINT
        ) from error


def _member(root: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        if isinstance(root, dict) and key not in root:
            # The key is not a string. The manifest has its text.
            key = next(original for original in root if str(original) == key)
        root = root[key]
    return root
