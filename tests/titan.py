"""A small training run with the components of TorchTitan 0.3.0, on CPU processes.

The loop stands for TorchTitan's Trainer, which trains on GPUs only: it calls the manager as that
one does. Optimizers, schedulers, dataloader and manager are TorchTitan's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset

WIDTH = 40
"""Uneven over two ranks once it is multiplied by 3, and enough for several blocks."""


class Data(IterableDataset[torch.Tensor]):
    """Numbered random batches, with a position that is saved."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            generator = torch.Generator().manual_seed(self.position)
            yield torch.randn(WIDTH, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class TrainState:
    """The state that TorchTitan's Trainer has of its own."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": 100 * self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["ntokens_seen"] == 100 * state["step"]
        self.step = state["step"]


class Names:
    """Stands for TorchTitan's adapter to the names of a Hugging Face model."""

    fqn_to_index_mapping: dict[str, int] | None = None
    hf_assets_path: str | None = None

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {f"hf.{name}": value for name, value in state.items()}

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("hf."): value for name, value in state.items()}

    def get_hf_storage_reader(self, path: str, from_quantized: bool) -> Any:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        assert not from_quantized
        return HuggingFaceStorageReader(path)


class Trainer:
    """A small FSDP2 model in a loop as TorchTitan's."""

    def __init__(self, base_folder: str, *, stock: bool = False, **keys: Any) -> None:
        from torchtitan.components import checkpointer
        from torchtitan.components.dataloader import ParallelAwareDataloader
        from torchtitan.components.optimizer import (
            LRSchedulersContainer,
            OptimizersContainer,
            ParamGroupConfig,
        )

        import holdfast.hosts.torchtitan

        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(keys.pop("seed", 5))
        self.model = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Linear(3 * WIDTH, 1))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (size,)))
        group = ParamGroupConfig(
            pattern=".*",
            optimizer_name="AdamW",
            optimizer_kwargs={"lr": 0.01, "betas": (0.9, 0.95)},
        )
        config = OptimizersContainer.Config(param_groups=[group], implementation="for-loop")
        self.optimizers = config.build(model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=10)
        self.loader = ParallelAwareDataloader(
            Data(), dp_rank=rank, dp_world_size=size, batch_size=2
        )
        self.state = TrainState()
        module = checkpointer if stock else holdfast.hosts.torchtitan
        keys = {"enable": True, "interval": 1, "folder": "saved", "keep_latest_k": 0} | keys
        load_step = keys.pop("load_step", -1)
        self.manager = module.CheckpointManager.Config(**keys).build(
            dataloader=self.loader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.state},
            sd_adapter=Names(),
            base_folder=base_folder,
        )
        if keys.get("async_mode") == "async_with_pinned_mem" and not stock:
            # TorchTitan's own stager pins memory, for which torch needs a GPU.
            options = StagingOptions(
                use_pinned_memory=False, use_async_staging=True, use_non_blocking_copy=False
            )
            self.manager.stager = DefaultStager(options)
        self.loaded = self.manager.load(step=load_step)

    def train(self, steps: int, before: Callable[[int], None] | None = None) -> None:
        """Train to step `steps`, which is not the last one. `before` is called before each save."""
        batches = iter(self.loader)
        while self.state.step < steps:
            self.state.step += 1
            self.model(next(batches)).square().mean().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            if before is not None:
                before(self.state.step)
            self.manager.save(self.state.step)
            self.manager.maybe_wait_for_staging()

    def close(self) -> dict[str, Any]:
        """Everything that a checkpoint holds, as whole tensors and plain values."""
        self.manager.maybe_wait_for_saving()
        self.manager.close()
        state = self.model.state_dict() | {
            f"optimizer.{name}": value for name, value in self.optimizers.state_dict().items()
        }
        state |= {"lr": [s.get_last_lr() for s in self.schedulers.schedulers]}
        state |= self.state.state_dict() | {"data": self.loader.state_dict()["world_size"]}
        return {name: whole(value) for name, value in state.items()}


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else value


class Lines(logging.Handler):
    """The warnings of Holdfast in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("holdfast").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(
    rank: int, size: int, folder: str, steps: int, keys: dict[str, Any]
) -> tuple[int, dict[str, Any], list[str]]:
    """Resume, train to `steps`. Returns the step resumed from, the state, and the warnings."""
    warnings.simplefilter("ignore")
    lines = Lines()
    trainer = Trainer(folder, **keys)
    resumed_from = trainer.state.step
    trainer.train(steps)
    return resumed_from, trainer.close(), lines.lines


def steps_in(folder: Path) -> list[str]:
    """Everything in the folder of checkpoints, files to lock left out."""
    return sorted(n for n in os.listdir(folder / "saved") if not n.startswith(".held-"))  # noqa: PTH208
