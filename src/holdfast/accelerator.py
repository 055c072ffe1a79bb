"""Accelerators: devices, the order of work in their streams, and page-locked memory.

No other module asks torch for a device. This one works with CUDA, ROCm and XPU, by
`torch.accelerator`. MPS has only one stream, so copies from and to it block.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from holdfast.errors import UsageError
from holdfast.spelling import spelled_bytes

WITHOUT_STREAMS = ("cpu", "meta", "mps")
"""Kinds of devices without streams. Copies from and to them block."""


def num_devices() -> int:
    """Return how many devices of this host a job can train on. Return 0 for MPS, which has no
    collectives."""
    current = torch.accelerator.current_accelerator()
    return torch.accelerator.device_count() if current and has_streams(current) else 0


def use_device(index: int) -> torch.device:
    """Make the device with this index the current device of this thread, and return it."""
    torch.accelerator.set_device_index(index)
    current = torch.accelerator.current_accelerator()
    assert current is not None, "only a device that `num_devices` counts may be used"
    return torch.device(current.type, index)


def device_for(kind: str) -> torch.device:
    """Return this process's current device of `kind`, such as "cuda"; the CPU if there is none."""
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "cpu" or current is None or current.type != kind:
        return torch.device("cpu")
    return torch.device(kind, torch.accelerator.current_device_index())


def memory_bytes_max(device: torch.device) -> int:
    """Return the peak of the memory that this process has allocated on a device, in bytes."""
    return torch.accelerator.max_memory_allocated(device)


def rng_states() -> dict[str, torch.Tensor]:
    """Return the RNG state of this thread's device, keyed by the kind of the device. Return `{}`
    without an accelerator."""
    current = torch.accelerator.current_accelerator()
    if current is None or not torch.accelerator.is_available():
        return {}
    return {current.type: torch.get_device_module(current).get_rng_state()}


def set_rng_states(states: dict[str, Any]) -> None:
    """Restore the RNG state of this thread's device. Ignore states of other kinds of devices."""
    for kind in rng_states().keys() & states.keys():
        torch.get_device_module(kind).set_rng_state(states[kind])


def has_streams(device: torch.device) -> bool:
    """Whether copies from and to this device are queued, so that they may end after the call."""
    return device.type not in WITHOUT_STREAMS


def devices_of(tensors: Iterable[torch.Tensor]) -> tuple[torch.device, ...]:
    """Return the devices that hold these tensors and have streams, sorted by index."""
    devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
    return tuple(sorted(filter(has_streams, devices), key=lambda device: device.index))


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait for the work in this thread's current stream of each device."""
    for device in devices:
        torch.accelerator.current_stream(device).synchronize()


class QueuedWork:
    """Work that one thread has queued on some devices, and that other threads wait for.

    A new thread starts with device 0 and the default streams. Without an event for each device, its
    kernels and copies would not wait for those of the training thread.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        """Call this in the thread that has queued the work."""
        self.devices: tuple[torch.device, ...] = tuple(devices)
        self._events = [
            torch.accelerator.current_stream(device).record_event() for device in self.devices
        ]
        self._index = torch.accelerator.current_device_index() if self.devices else None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Context in which this thread has the same current device as the thread that queued the
        work, and a new current stream on each device, which waits for that work. On exit, wait for
        the work in the new streams."""
        with ExitStack() as entered:
            streams = [torch.Stream(device) for device in self.devices]
            for stream, event in zip(streams, self._events, strict=True):
                stream.wait_event(event)
                entered.enter_context(stream)
            if self._index is not None:
                entered.enter_context(torch.accelerator.device_index(self._index))
            try:
                yield
            finally:
                for stream in streams:
                    stream.synchronize()


def locked_memory(nbytes: int) -> torch.Tensor:
    """Allocate page-locked memory, which a device can copy from and to without the CPU."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")


def can_lock(devices: Sequence[torch.device]) -> bool:
    """Whether `PageLock` works for these devices. It does for CUDA and ROCm."""
    return devices[0].type == "cuda"


class PageLock:
    """Page lock of memory that is already allocated. The memory may be in huge pages. The lock ends
    when this object is deleted, or by `release`."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        """`device`: any device of this process. The lock holds for all of them.

        Raises:
            UsageError: the driver refuses to lock the memory.
        """
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # Set the device of this thread. Otherwise CUDA could create a context on device 0.
        with torch.accelerator.device_index(device.index):
            status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if status:
            raise UsageError(
                f"the driver of `{device}` did not page-lock {spelled_bytes(memory.nbytes)} of "
                f"host memory: CUDA error {status}",
            )
        # `finalize` keeps `memory` allocated: its address must not be reused before the unlock.
        self._unlock = weakref.finalize(
            self, _unlock, runtime.cudaHostUnregister, memory, os.getpid()
        )
        self._unlock.atexit = False

    def release(self) -> None:
        """End the lock. No copy may be in progress."""
        self._unlock()


_PORTABLE = 1
"""`cudaHostRegisterPortable`: the lock holds for all CUDA contexts of the process."""


def _unlock(unregister: Callable[[int], object], memory: torch.Tensor, pid: int) -> None:
    # A forked child does not inherit the lock, and cannot use the driver.
    if pid == os.getpid():
        unregister(memory.data_ptr())


class Ring:
    """Buffers for copies to devices. A buffer is reused once the copies from it have ended.

    Only one thread may use a ring. Keep the ring until `QueuedWork.followed` has waited for the
    copies.
    """

    def __init__(self, num: int, nbytes: int, devices: Iterable[torch.device]) -> None:
        """Allocate `num` page-locked buffers of `nbytes`; without devices, one pageable buffer."""
        self._devices = tuple(devices)
        if self._devices:
            self._tensors = [locked_memory(nbytes) for _ in range(num)]
        else:
            self._tensors = [torch.empty(nbytes, dtype=torch.uint8, device="cpu")]
        self._buffers = [tensor.numpy().data for tensor in self._tensors]
        self._events: list[list[torch.Event]] = [[] for _ in self._tensors]
        self._current = 0

    @property
    def current(self) -> memoryview:
        """The buffer to fill and to copy from, until `advance` is called."""
        return self._buffers[self._current]

    def advance(self) -> memoryview:
        """Return the next buffer, once it is free. Call this after the copies from the current
        buffer are queued in the current streams."""
        if self._devices:
            self._events[self._current] = [
                torch.accelerator.current_stream(device).record_event() for device in self._devices
            ]
            self._current = (self._current + 1) % len(self._tensors)
            for event in self._events[self._current]:
                event.synchronize()
        return self.current
