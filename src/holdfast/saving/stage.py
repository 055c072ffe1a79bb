"""The host copy of what is to be written: of one piece of a tensor, or of all as a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from holdfast.errors import UsageError
from holdfast.format.region import Region
from holdfast.format.torchzip import PAGE_BYTES
from holdfast.planning.file_layout import TensorItem
from holdfast.saving.write import WINDOW_BYTES
from holdfast.spelling import spelled_bytes
from holdfast.state.layout import bytes_of
from holdfast.storage.direct import huge_memory

TensorOf = Callable[[TensorItem], torch.Tensor]
"""`tensor_of(item)`: the region of its tensor. As training has it: on its own device, in its own
dtype, its elements wherever they lie."""


def box_of(tensor: torch.Tensor, local: Region) -> torch.Tensor:
    """A box of `tensor`, which has no gradient, in its memory."""
    whole = local.stop == tensor.shape and not any(local.start)
    return tensor if whole else tensor[local.slices()]


def host_bytes(box: torch.Tensor, dtype: str) -> memoryview:
    """Its elements in host memory, row-major, as `dtype`; its own memory where that can be."""
    piece = box.resolve_conj().resolve_neg().to(_dtype(dtype)).contiguous()
    return bytes_of(piece.cpu())


def host_windows(box: torch.Tensor, dtype: str) -> Iterable[memoryview]:
    """The same in windows of `WINDOW_BYTES`, so that what cannot be its own memory is never a copy
    of all of it."""
    made = _dtype(dtype)
    plain = not (box.is_conj() or box.is_neg())
    if box.is_cpu and box.dtype == made and box.is_contiguous() and plain:
        return (bytes_of(box),)
    return _copied(box, made)


def _copied(box: torch.Tensor, made: torch.dtype) -> Iterator[memoryview]:
    num_elements = WINDOW_BYTES // made.itemsize
    for start in range(0, box.numel(), num_elements):
        count = min(num_elements, box.numel() - start)
        window = torch.frombuffer(huge_memory(count * made.itemsize), dtype=made, count=count)
        _fill(window, box, start)
        yield bytes_of(window)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _fill(window: torch.Tensor, box: torch.Tensor, start: int) -> None:
    """Copy as many elements as the window has, from `start` on in row-major order: whole rows at
    once, and what there is of the rows before and after them."""
    if box.ndim <= 1:
        window.copy_(box.reshape(-1)[start : start + len(window)])
        return
    row = box[0].numel()
    first, skipped = divmod(start, row)
    if skipped or len(window) < row:
        head = min(row - skipped, len(window))
        _fill(window[:head], box[first], skipped)
        window, first = window[head:], first + 1
    rows = len(window) // row
    if rows:
        whole = box[first : first + rows]
        window[: rows * row].view(whole.shape).copy_(whole)
    if len(window) > rows * row:
        _fill(window[rows * row :], box[first + rows], 0)


class Snapshot:
    """Host memory for one copy of what a rank writes, laid out as the file that it becomes.

    Allocated when it is first needed and reused; page-locked where there is a GPU to copy from.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

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
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        free = free_memory()
        if free is not None and nbytes > free:
            raise UsageError(
                f"saving in the background needs {spelled_bytes(nbytes)} of host memory on this "
                f"rank for a snapshot, {spelled_bytes(free)} are free",
            )
        if torch.cuda.is_available():
            memory = torch.empty(
                nbytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=True, device="cpu"
            )
        else:
            memory = torch.frombuffer(huge_memory(nbytes + PAGE_BYTES), dtype=torch.uint8)
        # Data that lies on pages in the file does so here, and is written from where it is.
        self._memory = memory[-memory.data_ptr() % PAGE_BYTES :][:nbytes]

    def copy(self, items: Sequence[TensorItem], tensor_of: TensorOf) -> None:
        """Copy these items of an image that there is room for. Blocks until they are here."""
        gpu = None
        for item in items:
            if item.data.nbytes:
                box = tensor_of(item)
                gpu = box.device if box.is_cuda else gpu
                self.tensor_of(item).copy_(box, non_blocking=True)
        if gpu is not None:
            torch.cuda.current_stream(gpu).synchronize()

    def tensor_of(self, item: TensorItem) -> torch.Tensor:
        """Where its copy is, or will be: contiguous, in the dtype that is written."""
        elements = self._memory[item.data.offset : item.data.stop].view(_dtype(item.dtype))
        return elements.view(item.region.shape)

    def memory(self, nbytes: int) -> memoryview:
        """That of a file of so many bytes, which there is room for."""
        return bytes_of(self._memory[:nbytes])


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
