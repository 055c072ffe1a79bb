"""Let `FileSystemWriter` and `FileSystemReader` save and load as Holdfast does, in this process."""

from __future__ import annotations

import copyreg
import logging
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
)
from torch.distributed.checkpoint.metadata import Metadata

from holdfast.dcp.reader import Reader
from holdfast.dcp.writer import Writer

logger: logging.Logger = logging.getLogger("holdfast")

_OURS = "_holdfast"
"""Name of an attribute of stock objects. Its value is the object of Holdfast that does their work,
or None."""

_WRITER_METHODS = ("reset", "prepare_local_plan", "prepare_global_plan", "write_data", "finish")
_READER_METHODS = ("reset", "prepare_local_plan", "prepare_global_plan", "read_data")


def install() -> None:
    """Let every `FileSystemWriter` and `FileSystemReader` of this process use Holdfast, for callers
    that make these objects themselves, and for `dcp.save(state, checkpoint_id=path)`.

    Stock DCP still saves and loads in these cases:

    * for subclasses of the two classes;
    * for writers with `_extensions` or with a `serialization_format` other than `TORCH_SAVE`, and
      for saves without collectives. A warning says so;
    * in other processes. `async_save` with a process uses Holdfast if you pass a
      `FileSystemWriter`, but not if you pass only a `checkpoint_id`.

    A second call changes nothing.
    """
    if _OURS in FileSystemWriter.__dict__:
        return
    setattr(FileSystemWriter, _OURS, None)
    setattr(FileSystemReader, _OURS, None)
    for name in _WRITER_METHODS:
        _patch(FileSystemWriter, name, _forwarded(FileSystemWriter, name))
    for name in _READER_METHODS:
        _patch(FileSystemReader, name, _forwarded(FileSystemReader, name))
    _patch(FileSystemWriter, "set_up_storage_writer", _set_up_storage_writer)
    _patch(FileSystemWriter, "__reduce__", _reduce)
    _patch(FileSystemReader, "read_metadata", _read_metadata)
    _patch(FileSystemReader, "set_up_storage_reader", _set_up_storage_reader)


def uninstall() -> None:
    """Undo `install`. Do nothing if `install` was not called."""
    for cls in (FileSystemWriter, FileSystemReader):
        if _OURS in cls.__dict__:
            delattr(cls, _OURS)
    for (patched, name), original in _originals.items():
        if original is None:
            delattr(patched, name)
        else:
            setattr(patched, name, original)
    _originals.clear()


_originals: dict[tuple[type, str], Any] = {}
"""Original methods, keyed by class and name; None for methods that the class inherited."""


def _patch(cls: type, name: str, method: Callable[..., Any]) -> None:
    _originals[cls, name] = cls.__dict__.get(name)
    setattr(cls, name, method)


def _stock(cls: type, name: str) -> Callable[..., Any]:
    """Return the original method of a stock class, even if the method is patched."""
    original = _originals.get((cls, name))
    method: Callable[..., Any] = original or getattr(cls.__mro__[1], name)
    return method


def _forwarded(cls: type, name: str) -> Callable[..., Any]:
    """Return a method for the stock class `cls` that calls the method `name` of Holdfast's object,
    if there is one, else that of `cls`."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = getattr(self, _OURS)
        if ours is None or name == "reset":
            # `reset` comes first, and tells the stock object its path.
            setattr(self, _OURS, None)
            return _stock(cls, name)(self, *args, **kwargs)
        return getattr(ours, name)(*args, **kwargs)

    return method


def _set_up_storage_writer(self: Any, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
    why = _why_stock(self, use_collectives=kwargs.get("use_collectives", True))
    if why is None:
        ours = Writer(self.path, overwrite=self.overwrite)
        setattr(self, _OURS, ours)
        ours.set_up_storage_writer(is_coordinator, *args, **kwargs)
        return
    setattr(self, _OURS, None)
    if type(self) is FileSystemWriter:
        logger.warning("`%s` is saved by stock DCP: it is saved %s", self.path, why)
    _stock(FileSystemWriter, "set_up_storage_writer")(self, is_coordinator, *args, **kwargs)


def _why_stock(writer: Any, *, use_collectives: bool) -> str | None:
    """Return the reason why stock DCP must save; None if Holdfast can save."""
    if type(writer) is not FileSystemWriter:
        return "by a subclass of FileSystemWriter"
    if writer.serialization_format != SerializationFormat.TORCH_SAVE:
        return f"as {writer.serialization_format.name}"
    if writer.transforms.extensions:
        return "with extensions, which change the bytes"
    return None if use_collectives else "without collectives"


def _reduce(self: Any) -> Any:
    # The other process has not called `install`, so send Holdfast's own writer instead.
    if _why_stock(self, use_collectives=True) is None:
        ours = Writer(self.path, overwrite=self.overwrite)
        return Writer, (ours.checkpoint_id,), ours.__getstate__()
    return copyreg.__newobj__, (type(self),), self.__dict__  # type: ignore[attr-defined]


def _read_metadata(self: Any, *args: Any, **kwargs: Any) -> Metadata:
    # A save without collectives makes an index per rank, which only stock DCP can read.
    if type(self) is not FileSystemReader or kwargs.get("rank") is not None:
        setattr(self, _OURS, None)
        metadata: Metadata = _stock(FileSystemReader, "read_metadata")(self, *args, **kwargs)
        return metadata
    ours = Reader(self.path)
    setattr(self, _OURS, ours)
    return ours.read_metadata()


def _set_up_storage_reader(
    self: Any, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
) -> None:
    if getattr(self, _OURS) is None:
        stock = _stock(FileSystemReader, "set_up_storage_reader")
        stock(self, metadata, is_coordinator, *args, **kwargs)
