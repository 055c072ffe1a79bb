"""Systems that save in the background, each with the fast settings that its documentation gives.

`dcp`: `async_save` in a thread with buffers that are kept; the same with staging in a thread, for
which the optimizer waits; in a process with shared memory. Pinned memory needs CUDA and is not
available on a CPU. `torch_checkpointing` stages in a thread and writes in a process; the optimizer
steps under its lock. `plain traffic` saves nothing: a thread copies as many bytes in memory, then
writes them as `raw` does.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
)
from torch.optim import Optimizer

from benchmarks.disk import WINDOW_BYTES, sync
from benchmarks.peers import without_direct_io
from benchmarks.raw import Way, raw_write
from holdfast import CheckpointConfig, CheckpointManager


class Background(Protocol):
    """System under test, for one run of training."""

    def start(self) -> None:
        """Start a save; the previous save must be finished."""
        ...

    def finish(self) -> None:
        """Wait until the save is durable; called in a thread of its own."""
        ...

    def optimizing(self) -> AbstractContextManager[object]:
        """Return the context in which the optimizer must step."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...


Make = Callable[[nn.Module, Optimizer, Path], Background]
"""Constructor from a model, its optimizer and an empty folder."""


def systems() -> dict[str, Make]:
    """Return the installed systems by name."""
    process = AsyncCheckpointerType.PROCESS
    installed: dict[str, Make] = {
        "plain traffic": PlainTraffic,
        "holdfast, async": partial(HoldfastAsync, mode="async"),
        "holdfast, async_with_pinned_mem": partial(HoldfastAsync, mode="async_with_pinned_mem"),
        "dcp, thread": DCPAsync,
        "dcp, thread, staged in a thread": partial(DCPAsync, staged=True),
        "dcp, process, shared memory": partial(DCPAsync, shared=True, kind=process),
    }
    if is_installed("torch_checkpointing"):
        installed["torch_checkpointing"] = TorchCheckpointingAsync
    return installed


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


class HoldfastAsync:
    """Holdfast's manager, saving at every step that it is given."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, folder: Path, mode: Any) -> None:
        config = CheckpointConfig(enable=True, interval=1, async_mode=mode, keep_latest_k=2)
        self._folder, self._step = folder, 0
        self._manager = CheckpointManager(folder, model=model, optimizers=optimizer, config=config)

    def start(self) -> None:
        self._step += 1
        self._manager.save(self._step)

    def finish(self) -> None:
        # A checkpoint gets its name once it is durable.
        while not (self._folder / f"step-{self._step}").exists():
            time.sleep(0.01)

    def copy_s(self) -> float:
        """Seconds that the copy of the last save took; 0 without one."""
        self._manager.wait()
        last = self._manager.timings().saves[-1].stages
        return last["stage"].most if "stage" in last else 0.0

    def optimizing(self) -> AbstractContextManager[object]:
        # The manager's optimizer hook waits by itself.
        return nullcontext()

    def close(self) -> None:
        self._manager.close()


class DCPAsync:
    """`async_save` of `torch.distributed.checkpoint`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        folder: Path,
        *,
        staged: bool = False,
        pinned: bool = False,
        shared: bool = False,
        kind: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    ) -> None:
        self._model, self._optimizer, self._folder, self._kind = model, optimizer, folder, kind
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=shared,
                use_async_staging=staged,
                use_non_blocking_copy=pinned,
            )
        )
        self._response: Any = None

    def start(self) -> None:
        shutil.rmtree(self._folder)
        state = {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer),
        }
        self._response = async_save(
            state,
            storage_writer=FileSystemWriter(self._folder),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )

    def finish(self) -> None:
        getattr(self._response, "upload_completion", self._response).result()
        sync(self._folder)

    def optimizing(self) -> AbstractContextManager[object]:
        if isinstance(self._response, AsyncSaveResponse):
            self._response.staging_completion.result()
        return nullcontext()

    def close(self) -> None:
        self._stager.close()


class DCPSave:
    """`save` of `torch.distributed.checkpoint`, which training waits for."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        self._model, self._optimizer, self._folder = model, optimizer, folder

    def start(self) -> None:
        shutil.rmtree(self._folder)
        state = {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer),
        }
        save(state, storage_writer=FileSystemWriter(self._folder))

    def finish(self) -> None:
        sync(self._folder)

    def optimizing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        """Nothing is open."""


class TorchCheckpointingAsync:
    """Manager of `torch_checkpointing`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        from torch_checkpointing import CheckpointManager as MetaManager

        self._model, self._optimizer, self._folder = model, optimizer, folder
        self._manager = without_direct_io(MetaManager.Config.with_async_save()).build()
        self._response: Any = None

    def start(self) -> None:
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        self._response = self._manager.save(str(self._folder / "step"), state)

    def finish(self) -> None:
        self._response.result()
        sync(self._folder)

    def optimizing(self) -> AbstractContextManager[object]:
        lock: AbstractContextManager[object] = self._manager.lock()
        return lock

    def close(self) -> None:
        self._manager.close()


class PlainTraffic:
    """Thread that copies and writes as many bytes as a save, without saving."""

    def __init__(self, model: nn.Module, _optimizer: Optimizer, folder: Path) -> None:
        self._path, nbytes = folder / "raw", 12 * sum(p.numel() for p in model.parameters())
        self._source, self._target = (np.ones(nbytes, np.uint8) for _ in range(2))
        self._pool = ThreadPoolExecutor(1)

    def start(self) -> None:
        self._done = self._pool.submit(self._copy_and_write)

    def _copy_and_write(self) -> None:
        for start in range(0, len(self._target), WINDOW_BYTES):
            window = slice(start, start + WINDOW_BYTES)
            self._target[window] = self._source[window]
        raw_write(self._path, len(self._target), Way())

    def finish(self) -> None:
        self._done.result()

    def optimizing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        self._pool.shutdown()
