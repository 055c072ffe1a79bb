"""The host copy of what is to be written: of one piece of a tensor, or of all as a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from holdfast.engine.spans import amount
from holdfast.engine.write import DataOf, FileImage, TensorItem
from holdfast.errors import UsageError
from holdfast.format.region import Region
from holdfast.format.torchzip import PAGE_BYTES

TensorOf = Callable[[str, Region], torch.Tensor]
"""`tensor_of(name, region)`: a region of a tensor, contiguous, on its own device."""


def piece_of(tensor: torch.Tensor, local: Region, dtype: torch.dtype | None) -> torch.Tensor:
    """A box of `tensor`, row-major, converted to `dtype` where one is given.

    Shares memory with the tensor where it can: plain, contiguous, its dtype unchanged.
    """
    piece = tensor[local.slices()] if tensor.ndim else tensor
    piece = piece.detach().resolve_conj().resolve_neg()
    return (piece if dtype is None else piece.to(dtype)).contiguous()


def host_bytes(tensor: torch.Tensor, local: Region, dtype: torch.dtype | None) -> memoryview:
    """The bytes of `piece_of` in host memory; the tensor's own where they can be."""
    return _flat_bytes(piece_of(tensor, local, dtype).cpu()).numpy().data


def _flat_bytes(piece: torch.Tensor) -> torch.Tensor:
    # Not `reshape(-1)`: a single element counts as contiguous whatever its stride.
    return piece.as_strided((piece.numel(),), (1,)).view(torch.uint8)


class Snapshot:
    """Host memory for one copy of what a rank writes, laid out as the file that it becomes.

    Allocated when it is first needed and reused; page-locked where there is a GPU to copy from.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of host memory held."""
        return self._memory.nbytes

    def reserve(self, nbytes: int) -> None:
        """Make room for a file of so many bytes.

        Raises:
            UsageError: there is not enough memory, with what is needed and free.
        """
        if nbytes <= self._memory.nbytes:
            return
        self._memory = torch.empty(0, dtype=torch.uint8)
        free = free_memory()
        if free is not None and nbytes > free:
            raise UsageError(
                f"saving in the background needs {amount(nbytes)} of host memory on this rank for "
                f"a snapshot, {amount(free)} are free",
                hint='`checkpoint.async_mode = "disabled"` needs none; with '
                '`checkpoint.on_low_memory = "wait"` training waits for saves that do not fit',
            )
        pinned = torch.cuda.is_available()
        memory = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        # Data that lies on pages in the file does so here, and is written from where it is.
        self._memory = memory[-memory.data_ptr() % PAGE_BYTES :][:nbytes]

    def copy(self, items: Sequence[TensorItem], tensor_of: TensorOf) -> None:
        """Copy these items of an image that there is room for. Blocks until they are here."""
        gpu = None
        for item in items:
            start, stop = item.data.offset, item.data.stop
            if stop > start:
                piece = tensor_of(item.name, item.region)
                gpu = piece.device if piece.is_cuda else gpu
                self._memory[start:stop].copy_(_flat_bytes(piece), non_blocking=True)
        if gpu is not None:
            torch.cuda.current_stream(gpu).synchronize()

    def data_of(self, image: FileImage) -> DataOf:
        """Where the copies are, or will be."""
        memory = self._memory.numpy().data
        held = {
            (item.name, item.region): memory[item.data.offset : item.data.stop]
            for item in image.tensors
        }
        return lambda name, region: held[name, region]


class Staging:
    """A copy that is made while training goes on. One thread runs it, any may wait for it."""

    def __init__(self, copy: Callable[[], None]) -> None:
        """To be called where training is: what it has done on a GPU so far is what is copied."""
        self._copy = copy
        self._over = threading.Event()
        self._done_before = torch.cuda.current_stream().record_event() if _has_gpu() else None

    def run(self) -> None:
        """Make the copy; on a GPU beside what training does there."""
        try:
            if self._done_before is None:
                self._copy()
            else:
                with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                    self._done_before.wait()
                    self._copy()
        finally:
            self._over.set()

    def wait(self) -> None:
        """Return once nothing is copied any more, whatever came of it."""
        self._over.wait()


def _has_gpu() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.is_available() and initialized


def free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
