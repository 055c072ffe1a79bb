"""What is not a tensor, from one container to another. Only here does a conversion need torch."""

from __future__ import annotations

import pickle
from typing import Any

from holdfast.catalog.source import read_value
from holdfast.convert.source import ConvertSource
from holdfast.convert.target import Values
from holdfast.errors import FormatError, UsageError


def as_containers(opened: ConvertSource) -> Values:
    """Every value as a step keeps it: in a container of its own."""
    entries = opened.manifest.values
    if opened.format != "torch":
        # Containers are kept as they are.
        return {n: (e.path, read_value(opened.source, n, e)) for n, e in entries.items()}
    _check_torch(opened)
    from holdfast.state.values import encode_value

    made = _load_torch_file(opened)
    return {
        name: (entry.path, encode_value(name, _member(made, entry.path)))
        for name, entry in entries.items()
    }


def as_pickles(opened: ConvertSource) -> Values:
    """Every value as a `.pt` file keeps it: a part of its one pickle."""
    _check_torch(opened)
    from holdfast.state.values import decode_value

    entries = opened.manifest.values
    if opened.format == "torch":
        made = _load_torch_file(opened)
        found = {name: _member(made, entry.path) for name, entry in entries.items()}
    else:
        found = {
            name: decode_value(
                name, read_value(opened.source, name, entry), where=f"{opened.where}/{entry.file}"
            )
            for name, entry in entries.items()
        }
    return {name: (entries[name].path, _pickled(name, value)) for name, value in found.items()}


def _check_torch(opened: ConvertSource) -> None:
    try:
        import torch  # noqa: F401 - what follows needs it
    except ImportError as error:
        raise UsageError(
            f"`{opened.path}` holds values that are not tensors, which only torch can convert; it "
            f"cannot be imported: {error}",
            hint="pip install torch; or `--model-only`, which leaves them out",
        ) from error


def _pickled(name: str, value: Any) -> bytes:
    import torch

    def holds_tensor(one: Any) -> bool:
        if isinstance(one, dict):
            return any(map(holds_tensor, one.values()))
        if isinstance(one, list | tuple | set):
            return any(map(holds_tensor, one))
        return isinstance(one, torch.Tensor)

    if holds_tensor(value):
        raise UsageError(
            f"`{name}` is a value with tensors inside, which have no place of their own in a .pt",
            hint="`--model-only` leaves out everything but the model",
        )
    return pickle.dumps(value, protocol=2)


def _load_torch_file(opened: ConvertSource) -> Any:
    """The objects of a `.pt` file; its tensors stay on disk."""
    import torch

    path = opened.path
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"`{path}`: its values cannot be read: {reason[0]}",
            hint="`--model-only` leaves out everything but the model",
        ) from error


def _member(made: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        made = made[key] if not isinstance(made, dict) or key in made else made[_spelled(made, key)]
    return made


def _spelled(made: dict[Any, Any], key: str | int) -> Any:
    return next(original for original in made if str(original) == key)
