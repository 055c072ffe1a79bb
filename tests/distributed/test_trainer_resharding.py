"""Resharding of the manager's checkpoints between all layouts, with real processes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints import differing
from extent import every, some
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.trainer.optim import build_optimizers
from holdfast.trainer.parallel import build_model, full_tensor, local_shard
from layouts import VOCAB_SIZE, Layout, add_flavors, gathered, named, parallel_context
from processes import run_processes

pytestmark = pytest.mark.timeout(400)  # many layouts load from many

LAYOUTS = {
    1: ["alone1"],
    2: ["pp2", "shard2 ep2"],
    3: some(["shard3", "pp3"], 1),
    4: every(4, ["shard4", "tp2 pp2", "cp2 shard2 ep4", "replicate2 tp2 ep2"], start=2),
    8: every(2, ["shard2 tp2 pp2 ep4", "replicate2 shard2 cp2"]),
}
"""Layouts by number of ranks. 3 divides neither the experts nor the layers."""

SOURCES = [text for texts in LAYOUTS.values() for text in texts]
SAVE = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
LOAD = CheckpointConfig(enable=True, load_only=True)


class ShardedModel:
    """This rank's shards of a model with experts, and of its AdamW state."""

    def __init__(self, text: str, *, steps: int) -> None:
        """Take `steps` optimizer steps with made-up gradients. Collective."""
        layout = Layout("" if text == "alone1" else text, "experts")
        config = layout.config("--training.global_batch_size", "24", "--optimizer.name", "AdamW")
        self.stages: list[nn.Module] = build_model(config, parallel_context(config), VOCAB_SIZE)
        self.optimizers = build_optimizers(self.stages, config.optimizer)
        for _ in range(steps):
            for _, parameter in named(self.stages):
                parameter.grad = parameter.detach().sin()
            for optimizer in self.optimizers:
                optimizer.step()

    def manager(self, folder: Path, config: CheckpointConfig) -> CheckpointManager:
        return CheckpointManager(
            folder, model=self.stages, optimizers=self.optimizers, config=config
        )

    def contents(self) -> dict[str, Tensor]:
        """Gather every tensor on rank 0. Collective."""
        return gathered(
            {name: full_tensor(tensor).clone() for name, tensor in self._tensors().items()}
        )

    def shards(self) -> dict[str, Tensor]:
        """Return this rank's shard of every tensor."""
        return {name: local_shard(tensor)[0] for name, tensor in self._tensors().items()}

    def overwrite(self) -> None:
        """Overwrite every element."""
        for tensor in self.shards().values():
            tensor.fill_(-1)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in named(self.stages):
            tensors[name] = parameter.detach()
            for optimizer in self.optimizers:
                for slot, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{slot}"] = value
        return tensors


def set_up() -> None:
    add_flavors()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def train_and_save(rank: int, size: int, text: str, folder: Path) -> None:
    set_up()
    save(ShardedModel(text, steps=2), folder / text)


def save(model: ShardedModel, folder: Path) -> None:
    """Save a checkpoint, and beside it the expected contents."""
    with model.manager(folder, SAVE) as manager:
        manager.save(1)
    contents = model.contents()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(contents, folder / "expected.pt")


def load_all(rank: int, size: int, target: str, sources: list[str], folder: Path) -> list[str]:
    """Load each checkpoint in the layout `target`; return the tensors that differ.

    All checkpoints have the same contents. The first is compared as a whole, the others by this
    rank's shards. Three ranks save the first again, for other layouts to load.
    """
    set_up()
    model = ShardedModel(target, steps=0)
    shards: dict[str, Tensor] = {}
    wrong = []
    for source in sources:
        with model.manager(folder / source, LOAD) as manager:
            assert manager.load() == 1
        if not shards:
            loaded = model.contents()
            expected = torch.load(folder / SOURCES[0] / "expected.pt") if rank == 0 else {}
            shards = {name: tensor.clone() for name, tensor in model.shards().items()}
        else:
            loaded, expected = model.shards(), shards
        wrong += [f"{source} on {target}: {n}" for n in differing(loaded, expected)]
        if (source, target) == (sources[0], LAYOUTS[3][0]):
            save(model, folder / "8 on 3")
        model.overwrite()
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint in every layout, all with the same contents."""
    folder = tmp_path_factory.mktemp("saved")
    for size, texts in LAYOUTS.items():
        for text in texts:
            run_processes(size, train_and_save, text, folder)
    first, *others = (torch.load(folder / text / "expected.pt") for text in SOURCES)
    assert not [names for other in others if (names := differing(other, first))]
    return folder


def check(size: int, sources: list[str], folder: Path) -> None:
    for target in LAYOUTS[size]:
        assert run_processes(size, load_all, target, sources, folder) == [[]] * size


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))]
)
def test_every_layout_loads_the_checkpoints_of_every_other(size: int, folder: Path) -> None:
    """G6, G9: weights and AdamW state of a model with experts are equal bit for bit. Method:
    replicas, shards, tensor, pipeline, context and expert parallelism, alone and combined."""
    check(size, SOURCES, folder)


@pytest.mark.slow
def test_eight_ranks_load_the_checkpoints_of_one_and_of_three(folder: Path) -> None:
    """G6, G9: a checkpoint loads on more ranks than saved it, evenly or not."""
    check(8, [*LAYOUTS[1], *LAYOUTS[3]], folder)


def test_a_checkpoint_goes_from_eight_ranks_to_three_to_one(folder: Path) -> None:
    """G6, G9: 3 ranks load a checkpoint of 8 and save it, one loads that, bit for bit."""
    check(3, [*LAYOUTS[8], *(text for text in SOURCES if text not in LAYOUTS[8])], folder)
    expected = torch.load(folder / LAYOUTS[8][0] / "expected.pt")
    assert not differing(torch.load(folder / "8 on 3" / "expected.pt"), expected)
    check(1, ["8 on 3", *SOURCES], folder)
