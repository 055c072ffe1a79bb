"""Conversion of values (entries that are not tensors). No other part of a conversion needs
torch."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from typing import Any

from holdfast.catalog.open_any import OpenCheckpoint
from holdfast.catalog.source import read_value
from holdfast.convert.target import Values
from holdfast.errors import FormatError, UsageError
from holdfast.format.pickles import DtypeName, Other
from holdfast.format.structure import types_by_path, with_types

_HINT = "`--model-only` leaves out everything but the model"


def encoded_values(checkpoint: OpenCheckpoint, *, pickled: bool) -> Values:
    """Return the path and the bytes of every value, by name. The bytes are a pickle if `pickled`,
    else a container. A pickle has numbers of Python in place of numpy scalars, which `torch.load`
    refuses by default."""
    entries, source = checkpoint.manifest.values, checkpoint.source
    if not checkpoint.values and not pickled:
        return {n: (e.path, read_value(source, n, e)) for n, e in entries.items()}
    try:
        from holdfast.state.values import decode_value, encode_value
    except ImportError as error:
        raise UsageError(
            f"`{checkpoint.where}` has values that are not tensors, which need torch to be "
            f"converted; it cannot be imported: {error}",
            hint="pip install torch; or `--model-only`, which leaves out the values",
        ) from error
    if checkpoint.values:
        try:
            values = {name: _built(checkpoint.values[name]) for name in entries}
        except RecursionError as error:
            raise FormatError(
                f"a value of `{checkpoint.where}` is nested too deep", hint=_HINT
            ) from error
    else:
        types = types_by_path(checkpoint.manifest.structure)
        values = {
            name: with_types(
                decode_value(
                    name, read_value(source, name, entry), where=f"{source.url}/{entry.file}"
                ),
                types.get(entry.path, {}),
            )
            for name, entry in entries.items()
        }
    encode = _pickled if pickled else encode_value
    return {
        name: (entries[name].path, encode(name, _with_empty_bytes(value)))
        for name, value in values.items()
    }


class _EmptyBytes:
    """Stand-in for `b""`. Pickle would write `b""` as a call of `bytes`, which `torch.load`
    refuses. Both read this one as `b""`."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return codecs.encode, ("", "latin1")


def _with_empty_bytes(value: Any) -> Any:
    """Return a value with an `_EmptyBytes` in place of each `b""` in it."""
    if value == b"" and type(value) is bytes:
        return _EmptyBytes()
    if type(value) in (list, tuple):
        return type(value)(map(_with_empty_bytes, value))
    if type(value) is dict:
        return {key: _with_empty_bytes(member) for key, member in value.items()}
    return value


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


def _built(value: object) -> Any:
    """Build a value that was read from a `.pt` file. For each `Other` or `DtypeName` in it, build
    the object that this describes, such as a set, a device or a dtype."""
    import torch

    match value:
        case DtypeName():
            return getattr(torch, value.name)
        case Other(title=title, args=args):
            members = [_built(member) for member in args]
            try:
                return _MAKERS[title](*members)
            except (TypeError, ValueError, LookupError, RuntimeError) as error:
                raise FormatError(f"a `{title}` has invalid arguments: {error}") from error
        case list() | tuple():
            return type(value)(map(_built, value))
    return value


def _device(*args: Any) -> Any:
    import torch

    return torch.device(*args)


def _bytearray(data: bytes | str, *encoding: str) -> bytearray:
    if not isinstance(data, bytes | str):
        raise TypeError("a number would make an array of any size")
    return bytearray(data.encode(*encoding) if isinstance(data, str) else data)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError("pickle encodes bytes as latin1 only")
    return text.encode(encoding)


_MAKERS: dict[str, Callable[..., Any]] = {
    "set": set,
    "frozenset": frozenset,
    "complex": complex,
    "bytearray": _bytearray,
    "torch.device": _device,
    "_codecs.encode": _encode,
}
"""Functions that build values, by their name in a pickle. `torchfile.SAFE` has the same names."""
