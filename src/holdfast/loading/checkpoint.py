"""Open a checkpoint to read single tensors and values."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from html import escape
from itertools import islice
from typing import Any, TypeVar

import torch

from holdfast.arguments import shown
from holdfast.catalog.arguments import region_of
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.paths import open_parent
from holdfast.catalog.source import Source, read_value
from holdfast.catalog.steady import UNREADABLE
from holdfast.errors import NotFoundError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.format.region import Region
from holdfast.format.structure import Types, types_by_path, with_types
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.read_plan import read_items
from holdfast.spelling import counted, spelled_bytes
from holdfast.state.shard import Piece
from holdfast.state.stored import StoredState, numpy_scalar, rebuilder
from holdfast.state.values import decode_value
from holdfast.uncompiled import uncompiled

T = TypeVar("T")

_ROWS_MAX = 20
"""Most tensors that a notebook shows."""


@uncompiled
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open the checkpoint at `path` and check its structure. No data is read yet.

    Raises:
        UsageError: `path` is not a path.
        NotFoundError: there is no checkpoint at `path`.
        DamagedError: files are missing, or have another size than the manifest says.
    """
    store, name = open_parent(path)
    opened = open_in(store, name)
    return Checkpoint(opened.source(store), opened)


class Checkpoint:
    """A checkpoint of Holdfast, or of stock `torch.distributed.checkpoint`."""

    def __init__(self, source: Source, opened: Opened | None = None) -> None:
        """`source`: reads the files of the checkpoint. `opened`: tells later whether another save
        has replaced the checkpoint; None if reads need not notice this."""
        self._source, self._opened = source, opened

    @property
    def manifest(self) -> Manifest:
        """Index of the checkpoint."""
        return self._source.manifest

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Dtype, global shape and chunks of each tensor, by name."""
        return self._source.manifest.tensors

    def names(self) -> list[str]:
        """Names of all tensors, then of all values."""
        return self._source.manifest.names()

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor or value of that name."""
        return name in self.manifest.tensors or name in self.manifest.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.manifest.tensors) + len(self.manifest.values)

    def __repr__(self) -> str:
        return f"<checkpoint `{self._source.url}`: {self._summary()}>"

    def _repr_html_(self) -> str:
        """Return an HTML table of the first tensors, which a notebook shows."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{entry.dtype}</td><td>{list(entry.shape)}</td></tr>"
            for name, entry in islice(self.tensors.items(), _ROWS_MAX)
        )
        num_more = len(self.tensors) - _ROWS_MAX
        more = f"<p>and {num_more:,} more</p>" if num_more > 0 else ""
        head = "<tr><th>tensor</th><th>dtype</th><th>shape</th></tr>"
        return (
            f"<p><code>{escape(self._source.url)}</code>: {escape(self._summary())}</p>"
            f"<table>{head}{rows}</table>{more}"
        )

    def _summary(self) -> str:
        manifest = self.manifest
        step = [] if manifest.step is None else [f"step {manifest.step}"]
        tensors = counted(len(manifest.tensors), "tensor")
        values = counted(len(manifest.values), "value")
        return ", ".join([*step, tensors, values, spelled_bytes(manifest.nbytes)])

    @uncompiled
    def state(self) -> dict[Any, Any]:
        """Read everything, nested as it was saved, with the same types of dicts, lists and keys.

        Tensors are new and on the CPU. In place of each object there is its saved state. The state
        of an optimizer has keys such as `state.NAME.exp_avg`, with the name of the parameter. Stock
        DCP does not store types: from its checkpoints, keys are read as text, and a dict with the
        keys 0, 1, ... as a list.

        Raises:
            DamagedError: bytes differ from those that were saved.
            FormatError: reading a value would run code that the checkpoint names.
        """
        stored = StoredState(self.manifest)

        def values(name: str) -> Any:
            return self.read(name) if name in self.tensors else self._stored_value(name)

        tops = [*stored.root.children, *(path[0] for path in stored.structure if len(path) == 1)]
        return {
            top: rebuilder(stored.below((top,)), stored.node((top,)))(values)
            for top in dict.fromkeys(tops)
        }

    @uncompiled
    def read(self, name: str, region: Region | tuple[slice, ...] | None = None) -> torch.Tensor:
        """Read a tensor, or a box of its elements, into a new tensor on the CPU. Only the
        blocks that hold these elements are read and checked.

        `region`: a `Region`, or one slice per dim as in indexing (without steps).

        Raises:
            UsageError: the region is not inside the tensor.
            NotFoundError: there is no tensor of that name.
            DamagedError: bytes differ from those that were saved.
        """
        entry = self._entry("tensor", name, self.tensors)
        box = region_of(name, entry.shape, region)
        # Check the chunks before the allocation: a damaged index may state a huge shape.
        read_items(name, entry, box)
        target = torch.empty(box.shape, dtype=getattr(torch, entry.dtype), device="cpu")
        if box.num_elements:
            wanted = Wanted(name, [Piece(box, Region.whole(box.shape))], target)
            with self._unless_replaced():
                read_tensors(self._source, [wanted])
        return target

    @uncompiled
    def value(self, name: str) -> Any:
        """Read the value `name`, with the types that it was saved with. Everything in a checkpoint
        that is not a tensor is a value.

        Raises:
            NotFoundError: there is no value of that name.
            DamagedError: bytes differ from those that were saved.
        """
        value = self._stored_value(name)
        types = self._types.get(self.manifest.values[name].path)
        return value if types is None else with_types(value, types, numpy_scalar)

    def _stored_value(self, name: str) -> Any:
        entry = self._entry("value", name, self.manifest.values)
        with self._unless_replaced():
            container = read_value(self._source, name, entry)
        return decode_value(name, container, where=f"{self._source.url}/{entry.file}")

    @cached_property
    def _types(self) -> Mapping[tuple[str | int, ...], Types]:
        """Types of values that are stored as another type, by the path of the value."""
        return types_by_path(self.manifest.structure)

    @contextmanager
    def _unless_replaced(self) -> Iterator[None]:
        """Context in which a failed read raises NotFoundError if the checkpoint was replaced or
        deleted."""
        try:
            yield
        except UNREADABLE as error:
            if self._opened is None or not self._opened.was_replaced(self._source.store):
                raise
            raise NotFoundError(
                f"`{self._source.url}` has been replaced or deleted since it was opened",
                hint="open it again",
            ) from error

    def _entry(self, kind: str, name: object, entries: Mapping[str, T]) -> T:
        """Return the entry named `name` in `entries`. `kind`: "tensor" or "value", for the message.

        Raises:
            UsageError: the name is not text.
            NotFoundError: there is no such entry.
        """
        if not isinstance(name, str):
            raise UsageError(f"`name` must be text, found: {shown(name)}")
        if name in entries:
            return entries[name]
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f"near it: {', '.join(near)}" if near else "`names()` lists what is there"
        # If a tensor is read as a value, or a value as a tensor, suggest the other method.
        other = {"value": self.tensors, "tensor": self._source.manifest.values}[kind]
        if name in other:
            hint = f'`read("{name}")`' if kind == "value" else f'`value("{name}")`'
        raise NotFoundError(f"`{self._source.url}` holds no {kind} `{name}`", hint=hint)
