"""Copy tensors to host memory: window by window, or all into a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from operator import attrgetter

import torch

from holdfast import accelerator
from holdfast.comm import capture
from holdfast.errors import UsageError
from holdfast.format.region import boxes_of_run
from holdfast.format.torchzip import PHASE_BYTES
from holdfast.planning.file_layout import TensorItem
from holdfast.saving.background import lower_priority
from holdfast.saving.memory import HostMemory, check_own_memory
from holdfast.saving.write import WINDOW_BYTES
from holdfast.spelling import counted, listed
from holdfast.state.layout import bytes_of
from holdfast.storage.direct import huge_memory

TensorOf = Callable[[TensorItem], torch.Tensor]
"""`tensor_of(item)`: returns the item's region of the training tensor, on its device and in its
dtype, with any strides."""


def host_bytes(box: torch.Tensor, dtype: str) -> memoryview:
    """Return the elements of `box` as bytes in host memory, row-major, converted to `dtype`: a view
    of the tensor's memory if possible, else a copy."""
    return bytes_of(box.resolve_conj().resolve_neg().to(_dtype(dtype)).contiguous().cpu())


def host_windows(box: torch.Tensor, dtype: str) -> Iterable[memoryview]:
    """Return the same bytes as `host_bytes`, in parts: one view of the tensor's memory if possible,
    else copies of `WINDOW_BYTES` each, made one after the other. So there is never a copy of the
    whole tensor."""
    wanted = _dtype(dtype)
    if (
        box.is_cpu
        and box.dtype == wanted
        and box.is_contiguous()
        and not (box.is_neg() or (wanted.is_complex and box.is_conj()))
    ):
        return (bytes_of(box),)
    return _copied_windows(box, wanted)


def _copied_windows(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    num_elements = WINDOW_BYTES // dtype.itemsize
    for first in range(0, tensor.numel(), num_elements):
        count = min(num_elements, tensor.numel() - first)
        # At the same distance from a page as in the file, so that the store need not copy it.
        memory = huge_memory(PHASE_BYTES + count * dtype.itemsize)
        window = torch.frombuffer(memory, dtype=dtype, count=count, offset=PHASE_BYTES)
        start = 0
        for box in boxes_of_run(tensor.shape, first, count):
            stop = start + box.num_elements
            window[start:stop].view(box.shape).copy_(tensor[box.slices()])
            start = stop
        yield bytes_of(window)


@cache
def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Snapshot:
    """Host copy of a rank's tensors, laid out as the file that is written from this memory.

    The memory is allocated on first use and reused. It is page-locked if tensors are copied from an
    accelerator.
    """

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._reserving: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory allocated."""
        self.wait()
        return self._memory.bytes.nbytes

    def growth(self, nbytes: int, devices: Sequence[torch.device] = ()) -> int:
        """Return how many more bytes of memory a file of `nbytes` needs."""
        self.wait()
        if devices and not self._memory.is_locked:
            return nbytes
        return max(0, nbytes - self.nbytes)

    def reserve(self, nbytes: int, devices: Sequence[torch.device] = (), threads: int = 1) -> None:
        """Allocate memory for a file of `nbytes`, unless there is enough. `devices`, `threads`: see
        `HostMemory`.

        Raises:
            UsageError: not enough host memory is free.
        """
        if self.growth(nbytes, devices):
            self._memory.release()
            check_own_memory(nbytes)
            self._memory = HostMemory(nbytes, devices, threads)

    def reserve_ahead(self, nbytes: int, devices: Sequence[torch.device], threads: int) -> None:
        """Start `reserve` in the background. The next call of `reserve` waits for it.

        Raises:
            UsageError: not enough host memory is free.
        """
        if not self.growth(nbytes, devices):
            return
        self._memory.release()
        check_own_memory(nbytes)

        def run() -> None:
            lower_priority()
            # After an error there is no memory, so `reserve` tries again, and raises the error.
            made = capture(lambda: HostMemory(nbytes, devices, threads))
            if isinstance(made, HostMemory):
                self._memory = made

        self._reserving = threading.Thread(target=run, name="holdfast-memory")
        self._reserving.start()

    def wait(self) -> None:
        """Wait for the memory that is being reserved in the background."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def copy(self, items: Sequence[TensorItem], tensor_of: TensorOf) -> None:
        """Copy each item's region into the snapshot, and wait for the copies. `tensor_of(item)`
        returns the tensor with the elements of that region. Call `reserve` first."""
        boxes = ((self.tensor_of(item), tensor_of(item)) for item in items if item.nbytes)
        devices: set[torch.device] = set()
        for target, box in boxes:
            is_queued = accelerator.has_streams(box.device)
            target.copy_(box, non_blocking=is_queued)
            if is_queued:
                devices.add(box.device)
        accelerator.synchronize(devices)

    def tensor_of(self, item: TensorItem) -> torch.Tensor:
        """Return the item's copy, as a contiguous tensor in the stored dtype."""
        elements = self._memory.bytes[item.data_offset : item.data_stop].view(_dtype(item.dtype))
        return elements.view(item.region.shape)

    def memory(self, nbytes: int) -> memoryview:
        """Return the memory of the whole file. `nbytes`: size of the file."""
        return bytes_of(self._memory.bytes[:nbytes])


_LISTED_MAX = 20
_VERSION = attrgetter("_version")


class ChangeCheck:
    """Check that training does not change tensors before their copy is complete.

    It notices operations that change a tensor in place, since torch counts them. Torch does not
    count a write through `tensor.data`, a NumPy array or `torch.from_dlpack`.
    """

    def __init__(
        self,
        names: Collection[str],
        tensors: Mapping[str, torch.Tensor],
        dtensors: Mapping[str, torch.Tensor],
    ) -> None:
        """Call this before training may change the tensors.

        `names`: tensors to check. `tensors`: local tensors by name, with all in `names`.
        `dtensors`: DTensors among `tensors`; torch counts the operations on a DTensor and those on
        its local tensor apart.
        """
        self._names, self._tensors, self._dtensors = names, tensors, dtensors
        self._counts = self._count()

    def run(self) -> None:
        """Check the tensors.

        Raises:
            UsageError: tensors have changed. The message has their names.
        """
        changes: dict[str, int] = {}
        counts = self._count()
        # Compare all at once first, since the loop over thousands of tensors takes milliseconds.
        if counts != self._counts:
            names = chain(self._tensors, self._dtensors)
            for name, before, now in zip(names, self._counts, counts, strict=True):
                if now != before and name in self._names:
                    changes[name] = changes.get(name, 0) + now - before
        lines = [f"`{name}`: {counted(n, 'operation')} in place" for name, n in changes.items()]
        if lines:
            raise UsageError(
                "tensors changed after `save` was called and before they were copied; expected: no "
                f"change until an optimizer steps, found:{listed(lines, _LISTED_MAX)}",
                hint="call `manager.wait_for_staging()` before your own code changes parameters or "
                'optimizer state, or use async_mode "async"',
            )

    def _count(self) -> list[int]:
        """Count the operations that have changed each tensor in place."""
        # Training waits for this. With names, or only for those to check, it takes twice as long.
        tensors = [*self._tensors.values(), *self._dtensors.values()]
        try:
            return [*map(_VERSION, tensors)]
        except RuntimeError:
            # Torch does not count for inference tensors.
            return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class Staging:
    """Copy that a thread makes while training continues. Any thread may wait for its end."""

    def __init__(self, copy: Callable[[], None], devices: Iterable[torch.device] = ()) -> None:
        """Call this in the training thread. `copy`: function that makes the copy, which `run`
        calls. The copy waits for the work that this thread has queued on `devices`."""
        self._copy = copy
        self._ended = threading.Event()
        self._queued = accelerator.QueuedWork(devices)

    def run(self) -> None:
        """Make the copy, in a separate stream on each device."""
        try:
            with self._queued.followed():
                self._copy()
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Return once the copy has ended, even if it failed."""
        self._ended.wait()
