"""Saving while training goes on: a host copy of the state, and a thread that finishes the save."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from holdfast.engine.ranks import outcome_of
from holdfast.engine.spans import amount
from holdfast.engine.write import DataOf, FileImage
from holdfast.errors import HoldfastError, UsageError
from holdfast.format.region import Region
from holdfast.format.torchzip import PAGE_BYTES


class Snapshot:
    """Host memory for one copy of what a rank writes, laid out as the file that it becomes.

    Allocated at the first copy and reused; page-locked where there is a GPU to copy from.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Of host memory held."""
        return self._memory.nbytes

    def take(self, image: FileImage, data_of: DataOf) -> DataOf:
        """Copy every region of the image. Returns where the copies are.

        Blocks for the copy. The copy before it is overwritten: its save must have been finished.

        Raises:
            UsageError: there is not enough memory, with what is needed and free.
        """
        self._make_room(image.nbytes)
        held: dict[tuple[str, Region], memoryview] = {}
        memory = self._memory.numpy().data
        for item in image.tensors:
            source = data_of(item.name, item.region)
            start, stop = item.data.offset, item.data.stop
            if stop > start:
                self._memory[start:stop].copy_(torch.frombuffer(source, dtype=torch.uint8))
            held[item.name, item.region] = memory[start:stop]
        return lambda name, region: held[name, region]

    def _make_room(self, nbytes: int) -> None:
        if nbytes <= self._memory.nbytes:
            return
        self._memory = torch.empty(0, dtype=torch.uint8)
        free = free_memory()
        if free is not None and nbytes > free:
            raise UsageError(
                f"saving in the background needs {amount(nbytes)} of host memory on this rank for "
                f"a snapshot, {amount(free)} are free",
                hint='`checkpoint.async_mode = "disabled"` needs none',
            )
        pinned = torch.cuda.is_available()
        memory = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        # Data that lies on pages in the file does so here, and is written from where it is.
        self._memory = memory[-memory.data_ptr() % PAGE_BYTES :][:nbytes]


class Background:
    """Finishes one save at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: HoldfastError | None = None

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Do `work`; what was started before must have been waited for."""
        assert self._thread is None, "wait first"

        def run() -> None:
            outcome = outcome_of(work)
            if isinstance(outcome, HoldfastError):
                self._error = outcome

        self._thread = threading.Thread(target=run, name="holdfast-save")
        self._thread.start()

    def wait(self) -> None:
        """Return once what was started is done; raise its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def free_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
