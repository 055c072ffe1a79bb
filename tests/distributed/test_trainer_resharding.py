"""Checkpoints of the manager from every axis to every other, with real processes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoints import differing
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.trainer.optim import build_optimizers
from holdfast.trainer.parallel import build_model, full_tensor, local_shard
from layouts import VOCAB_SIZE, Layout, add_flavors, merged, named, parallel_context
from processes import run_processes

pytestmark = pytest.mark.timeout(400)  # many layouts load from many

LAYOUTS = {
    1: ["alone1"],
    2: ["pp2", "shard2 ep2"],
    3: ["shard3", "pp3"],
    4: ["shard4", "tp2 pp2", "replicate2 tp2 ep2", "cp2 shard2 ep4"],
    8: ["shard2 tp2 pp2 ep4", "replicate2 shard2 cp2"],
}
"""Number of ranks to degrees. 3 divides neither the experts nor the layers."""

SOURCES = [text for texts in LAYOUTS.values() for text in texts]
SAVE = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
LOAD = CheckpointConfig(enable=True, load_only=True)


class Held:
    """What this rank holds of a model with experts, and of its AdamW."""

    def __init__(self, text: str, *, steps: int) -> None:
        """`steps` are taken along made-up gradients. Collective."""
        layout = Layout("" if text == "alone1" else text, "experts")
        config = layout.config("--training.global_batch_size", "24", "--optimizer.name", "AdamW")
        self.parts: list[nn.Module] = build_model(config, parallel_context(config), VOCAB_SIZE)
        self.optimizers = build_optimizers(self.parts, config.optimizer)
        for _ in range(steps):
            for _, parameter in named(self.parts):
                parameter.grad = parameter.detach().sin()
            for optimizer in self.optimizers:
                optimizer.step()

    def manager(self, folder: Path, config: CheckpointConfig) -> CheckpointManager:
        return CheckpointManager(
            folder, model=self.parts, optimizers=self.optimizers, config=config
        )

    def contents(self) -> dict[str, Tensor]:
        """Every tensor, whole, on rank 0. Collective."""
        return merged(
            {name: full_tensor(tensor).clone() for name, tensor in self._tensors().items()}
        )

    def own(self) -> dict[str, Tensor]:
        """This rank's part of every tensor."""
        return {name: local_shard(tensor)[0] for name, tensor in self._tensors().items()}

    def spoil(self) -> None:
        """Other values everywhere."""
        for tensor in self.own().values():
            tensor.fill_(-1)

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in named(self.parts):
            found[name] = parameter.detach()
            for optimizer in self.optimizers:
                for slot, value in optimizer.state.get(parameter, {}).items():
                    found[f"{name}/{slot}"] = value
        return found


def set_up() -> None:
    add_flavors()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def save_one(rank: int, size: int, text: str, folder: Path) -> None:
    """A checkpoint, and beside it what it is to hold."""
    set_up()
    save(Held(text, steps=2), folder / text)


def save(held: Held, folder: Path) -> None:
    with held.manager(folder, SAVE) as manager:
        manager.save(1)
    contents = held.contents()
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(contents, folder / "expected.pt")


def load_all(rank: int, size: int, target: str, sources: list[str], folder: Path) -> list[str]:
    """Load each checkpoint on a layout; what differs from what was saved.

    All hold the same, so what a rank has of the first, once that is found to be right as a whole,
    it has of each. Three ranks save what they have loaded from the first, for others to load.
    """
    set_up()
    held = Held(target, steps=0)
    own: dict[str, Tensor] = {}
    wrong = []
    for source in sources:
        with held.manager(folder / source, LOAD) as manager:
            assert manager.load() == 1
        if not own:
            found = held.contents()
            wanted = torch.load(folder / SOURCES[0] / "expected.pt") if rank == 0 else {}
            own = {name: tensor.clone() for name, tensor in held.own().items()}
        else:
            found, wanted = held.own(), own
        wrong += [f"{source} on {target}: {n}" for n in differing(found, wanted)]
        if (source, target) == (sources[0], LAYOUTS[3][0]):
            save(held, folder / "8 on 3")
        held.spoil()
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by every layout; they all hold the same."""
    made = tmp_path_factory.mktemp("saved")
    for size, texts in LAYOUTS.items():
        for text in texts:
            run_processes(size, save_one, text, made)
    first, *others = (torch.load(made / text / "expected.pt") for text in SOURCES)
    assert not [names for other in others if (names := differing(other, first))]
    return made


def check(size: int, sources: list[str], folder: Path) -> None:
    for target in LAYOUTS[size]:
        assert run_processes(size, load_all, target, sources, folder) == [[]] * size


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_layout_loads_what_every_other_has_saved(size: int, folder: Path) -> None:
    """G6, G9: weights and AdamW state of a model with experts, bit for bit: replicas, shards,
    tensor, pipeline, context and expert parallel, alone and together, each from each."""
    check(size, SOURCES, folder)


def test_eight_ranks_load_what_one_and_three_have_saved(folder: Path) -> None:
    """G6, G9: onto more ranks than have saved, evenly or not."""
    check(8, [*LAYOUTS[1], *LAYOUTS[3]], folder)


def test_eight_ranks_then_three_then_one(folder: Path) -> None:
    """G6, G9: what 8 ranks saved is loaded by 3, saved by them, and loaded by one, bit for bit."""
    check(3, [*LAYOUTS[8], *(text for text in SOURCES if text not in LAYOUTS[8])], folder)
    expected = torch.load(folder / LAYOUTS[8][0] / "expected.pt")
    assert not differing(torch.load(folder / "8 on 3" / "expected.pt"), expected)
    check(1, ["8 on 3", *SOURCES], folder)
