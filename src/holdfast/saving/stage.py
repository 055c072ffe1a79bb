"""Copy tensors to host memory: window by window, or all into a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from holdfast.errors import UsageError
from holdfast.format.region import boxes_of_run
from holdfast.format.torchzip import PAGE_BYTES
from holdfast.planning.file_layout import TensorItem
from holdfast.saving.write import WINDOW_BYTES
from holdfast.spelling import spelled_bytes
from holdfast.state.layout import bytes_of
from holdfast.storage.direct import huge_memory

TensorOf = Callable[[TensorItem], torch.Tensor]
"""`tensor_of(item)`: the item's region of the training tensor, on its device and in its dtype, with
any strides."""


def host_bytes(box: torch.Tensor, dtype: str) -> memoryview:
    """The elements in host memory, row-major, as `dtype`; a view of the tensor's memory if that is
    possible."""
    return bytes_of(box.resolve_conj().resolve_neg().to(_dtype(dtype)).contiguous().cpu())


def host_windows(box: torch.Tensor, dtype: str) -> Iterable[memoryview]:
    """The bytes of `host_bytes` as one view of the tensor's memory, or else copied in windows of
    `WINDOW_BYTES`, so that no copy of a whole tensor is made."""
    wanted = _dtype(dtype)
    plain = not (box.is_conj() or box.is_neg())
    if box.is_cpu and box.dtype == wanted and box.is_contiguous() and plain:
        return (bytes_of(box),)
    return _copied_windows(box, wanted)


def _copied_windows(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    num_elements = WINDOW_BYTES // dtype.itemsize
    for first in range(0, tensor.numel(), num_elements):
        count = min(num_elements, tensor.numel() - first)
        window = torch.frombuffer(huge_memory(count * dtype.itemsize), dtype=dtype, count=count)
        start = 0
        for box in boxes_of_run(tensor.shape, first, count):
            stop = start + box.num_elements
            window[start:stop].view(box.shape).copy_(tensor[box.slices()])
            start = stop
        yield bytes_of(window)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Snapshot:
    """Host copy of a rank's tensors, laid out as the file that is written from it.

    The memory is allocated on first use and reused. It is page-locked if there is a GPU.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of host memory allocated."""
        return self._memory.nbytes

    def reserve(self, nbytes: int) -> None:
        """Make room for a file of `nbytes`.

        Raises:
            UsageError: not enough host memory is free.
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
        # Data that is page-aligned in the file is so here too: it can be written without a copy.
        self._memory = memory[-memory.data_ptr() % PAGE_BYTES :][:nbytes]

    def copy(self, items: Sequence[TensorItem], tensor_of: TensorOf) -> None:
        """Copy the regions of these items, and wait for the copies. `reserve` must come before."""
        gpu = None
        for item in items:
            if item.data.nbytes:
                box = tensor_of(item)
                gpu = box.device if box.is_cuda else gpu
                self.tensor_of(item).copy_(box, non_blocking=True)
        if gpu is not None:
            torch.cuda.current_stream(gpu).synchronize()

    def tensor_of(self, item: TensorItem) -> torch.Tensor:
        """Memory of the item's copy, as a contiguous tensor in the stored dtype."""
        elements = self._memory[item.data.offset : item.data.stop].view(_dtype(item.dtype))
        return elements.view(item.region.shape)

    def memory(self, nbytes: int) -> memoryview:
        """Memory of the whole file, of `nbytes`."""
        return bytes_of(self._memory[:nbytes])


class Staging:
    """A copy that is made while training continues. One thread runs it, any thread may wait."""

    def __init__(self, copy: Callable[[], None]) -> None:
        """Call this in the training thread: the copy waits for the GPU work queued before."""
        self._copy = copy
        self._ended = threading.Event()
        self._queued = torch.cuda.current_stream().record_event() if _has_gpu() else None

    def run(self) -> None:
        """Make the copy, on a GPU in a stream of its own."""
        try:
            if self._queued is None:
                self._copy()
            else:
                with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                    self._queued.wait()
                    self._copy()
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Return once the copy has ended, even if it failed."""
        self._ended.wait()


def _has_gpu() -> bool:
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.is_available() and initialized


def check_memory(nbytes: int, others: Sequence[int]) -> None:
    """Check that the host has room for `nbytes` of this rank, and for those that the other ranks on
    it need at the same time. Raises a UsageError if not."""
    free, total = free_memory(), nbytes + sum(others)
    num_ranks = 1 + len(others)
    if num_ranks > 1 and free is not None and total > free:
        raise UsageError(
            f"saving in the background needs {spelled_bytes(total)} of host memory for the "
            f"snapshots of the {num_ranks} ranks on this host, {spelled_bytes(free)} are free",
        )


def free_memory() -> int | None:
    """Bytes of host memory that are available without swapping; None if the system has no
    `/proc/meminfo`."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
