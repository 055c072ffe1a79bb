"""Conversion of values (entries that are not tensors): the only part that needs torch."""

from __future__ import annotations

import pickle
from typing import Any

from holdfast.catalog.source import read_value
from holdfast.convert.source import ConvertSource
from holdfast.convert.target import Values
from holdfast.errors import FormatError, UsageError

_HINT = "`--model-only` leaves out everything but the model"


def as_containers(opened: ConvertSource) -> Values:
    """Return every value in a container of its own, for a checkpoint."""
    entries = opened.manifest.values
    if opened.format != "torch":
        return {n: (e.path, read_value(opened.source, n, e)) for n, e in entries.items()}
    _check_torch(opened)
    from holdfast.state.values import encode_value

    root = _load_torch_file(opened)
    return {
        name: (entry.path, encode_value(name, _member(root, entry.path)))
        for name, entry in entries.items()
    }


def as_pickles(opened: ConvertSource) -> Values:
    """Return every value as a fragment of the pickle in a `.pt` file."""
    _check_torch(opened)
    from holdfast.state.values import decode_value

    entries = opened.manifest.values
    if opened.format == "torch":
        root = _load_torch_file(opened)
        values = {name: _member(root, entry.path) for name, entry in entries.items()}
    else:
        values = {
            name: decode_value(
                name, read_value(opened.source, name, entry), where=f"{opened.where}/{entry.file}"
            )
            for name, entry in entries.items()
        }
    return {name: (entries[name].path, _pickled(name, value)) for name, value in values.items()}


def _check_torch(opened: ConvertSource) -> None:
    try:
        import torch  # noqa: F401 - the caller needs it
    except ImportError as error:
        raise UsageError(
            f"`{opened.path}` has values that are not tensors, which need torch to be converted; "
            f"it cannot be imported: {error}",
            hint="pip install torch; or `--model-only`, which leaves out the values",
        ) from error


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


def _load_torch_file(opened: ConvertSource) -> Any:
    """Load the objects of a `.pt` file. Its tensors stay on disk."""
    import torch

    try:
        return torch.load(opened.path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"the values of `{opened.path}` cannot be read: {reason[0]}", hint=_HINT
        ) from error


def _member(root: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        if isinstance(root, dict) and key not in root:
            # A key that the manifest has as text, such as a float.
            key = next(original for original in root if str(original) == key)
        root = root[key]
    return root
