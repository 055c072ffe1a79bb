"""State sharded over ranks: optimizers of every kind, models in every wrapper, data loaders."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import holdfast
from extent import EVERYTHING, every
from holdfast.errors import UsageError
from processes import run_processes

pytestmark = pytest.mark.timeout(400)  # the first test of a fixture waits for all its cases


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


class Joined(Optimizer):
    """Optimizer that wraps others and names their state by parameter numbers."""

    def __init__(self, *inner: Optimizer) -> None:
        self.inner = inner
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inner:
            one.step(closure)

    def state_dict(self) -> Any:
        return {str(number): one.state_dict() for number, one in enumerate(self.inner)}

    def load_state_dict(self, state_dict: Any) -> None:
        for number, one in enumerate(self.inner):
            one.load_state_dict(state_dict[str(number)])


class Container(Optimizer):
    """TorchTitan's container: torch's flattened state dict, named by parameters."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.inner = torch.optim.AdamW(part.parameters(), lr=0.01)
        super().__init__(list(part.parameters()), {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step(closure)

    def state_dict(self) -> Any:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        return get_optimizer_state_dict(self.part, self.inner, options=options)

    def load_state_dict(self, state_dict: Any) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(self.part, self.inner, state_dict, options=options)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "joined": lambda m: Joined(
        torch.optim.AdamW([p for p in m.parameters() if p.ndim == 2], lr=0.01),
        torch.optim.SGD([p for p in m.parameters() if p.ndim != 2], lr=0.1, momentum=0.9),
    ),
    "container": Container,
    "zero": lambda m: zero(m),
}


def zero(part: nn.Module) -> Any:
    """Torch's ZeroRedundancyOptimizer."""
    cls = import_module("torch.distributed.optim").ZeroRedundancyOptimizer
    return cls(part.parameters(), optimizer_class=torch.optim.AdamW, lr=0.01)


def each(
    rank: int, size: int, work: Callable[..., Any], cases: list[Any], *args: Any
) -> dict[Any, Any]:
    """Return what `work(rank, size, *args, *case)` returns, or raises, for each of several cases in
    turn."""
    results: dict[Any, Any] = {}
    for case in cases:
        try:
            results[case] = work(rank, size, *args, *case)
        except Exception:  # noqa: BLE001 - reported by the test of this case
            results[case] = AssertionError(f"rank {rank}: {traceback.format_exc()}")
    return results


def run_each(size: int, work: Callable[..., Any], cases: list[Any], *args: Any) -> dict[Any, Any]:
    """Run all cases in one job of `size` processes. Returns by case what each rank returns."""
    by_rank = run_processes(size, each, work, cases, *args, timeout_s=240)
    return {case: [results[case] for results in by_rank] for case in cases}


def of(results: list[Any]) -> list[Any]:
    """Results of the ranks; raises the first error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def train(
    rank: int, size: int, folder: str, until: int, kind: str, wrapper: str, mode: str
) -> dict[str, Any]:
    """Train on `size` ranks up to a step, from the checkpoint in the folder. Returns the full
    weights."""
    net: Any = model()
    net = fully_shard(net) if wrapper == "fsdp2" else DistributedDataParallel(net)
    optimizer = OPTIMIZERS[kind](net)
    config = holdfast.CheckpointConfig(
        enable=True,
        interval=1,
        last_save_model_only=False,
        async_mode=mode,  # type: ignore[arg-type]
        stop_signals=(),
    )
    with holdfast.CheckpointManager(
        folder, model=net, optimizers=optimizer, config=config
    ) as manager:
        for step in range(manager.load() + 1, until + 1):
            # Any number of ranks sees the same samples: each takes its share of them.
            batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            share = batch.chunk(size)[rank]
            optimizer.zero_grad()
            (net(share) - share.flip(0)).square().mean().backward()
            optimizer.step()
            manager.save(step)
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in net.named_parameters()
    }
    return {name: value.detach().clone() for name, value in whole.items()}


CASES = [
    (kind, wrapper, mode)
    for number, (kind, wrapper) in enumerate(
        (
            ("adamw", "fsdp2"),
            ("joined", "fsdp2"),
            ("container", "fsdp2"),
            ("joined", "ddp"),
            ("container", "ddp"),
            ("zero", "ddp"),
        )
    )
    for mode in every(2, ("disabled", "async_with_pinned_mem"), start=number)
]
"""By default, each optimizer in one of the two modes."""


def train_case(rank: int, size: int, folder: Path, name: str, until: int, *case: str) -> Any:
    """Run `train` in a folder of this case."""
    return train(rank, size, str(folder / "-".join(case) / name), until, *case)


@pytest.fixture(scope="module")
def optimizer_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Train every case at once, and in two halves, each half in new processes."""
    folder = tmp_path_factory.mktemp("optimizers")
    whole = run_each(2, train_case, CASES, folder, "whole", 4)
    run_each(2, train_case, CASES, folder, "halves", 2)
    return whole, run_each(2, train_case, CASES, folder, "halves", 4)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_sharded_optimizers_resume_bit_for_bit(
    case: tuple[str, str, str], optimizer_runs: tuple[Any, Any]
) -> None:
    """G9, G15. Method: two ranks train two steps, restart and train two more; the bits equal those
    of four steps without a restart."""
    whole, halves = (of(results[case]) for results in optimizer_runs)
    for name, value in whole[0].items():
        assert torch.equal(value, halves[0][name]), name
        assert torch.equal(value, halves[1][name]), name


def moments(rank: int, size: int, folder: str, kind: str, wrapper: str) -> list[torch.Tensor]:
    """Load on `size` ranks. Returns every moment in full."""
    net: Any = model()
    net = fully_shard(net) if wrapper == "fsdp2" else DistributedDataParallel(net)
    optimizer = OPTIMIZERS[kind](net)
    config = holdfast.CheckpointConfig(enable=True, load_only=True)
    manager = holdfast.CheckpointManager(folder, model=net, optimizers=optimizer, config=config)
    assert manager.load() == 2
    manager.close()
    inner = [*getattr(optimizer, "inner", [optimizer])] if kind == "joined" else [optimizer]
    if kind == "zero":
        inner = [optimizer.optim]
    found = []
    for one in inner:
        for slots in one.state.values():
            for value in slots.values():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                found.append(whole.clone())
    return found


@pytest.mark.parametrize(("kind", "wrapper"), [("joined", "fsdp2"), ("zero", "ddp")])
def test_optimizers_of_two_ranks_load_on_one(kind: str, wrapper: str, tmp_path: Path) -> None:
    """G9, G15. Method: save moments that are sharded over two ranks, or divided between them, and
    load them on one rank."""
    run_processes(2, train, str(tmp_path), 2, kind, wrapper, "disabled")
    by_two = run_processes(2, moments, str(tmp_path), kind, wrapper)
    (by_one,) = run_processes(1, moments, str(tmp_path), kind, wrapper)
    if kind == "zero":
        by_two = [[*by_two[0], *by_two[1]]]
    key = lambda one: (one.shape, one.sum().item())  # noqa: E731
    assert len(by_one) == len(by_two[0]) > 0
    for one, two in zip(sorted(by_one, key=key), sorted(by_two[0], key=key), strict=True):
        assert torch.equal(one, two)


def refused_fsdp1(rank: int, size: int, folder: str) -> list[str]:
    fsdp1: Any = import_module("torch.distributed.fsdp").FullyShardedDataParallel
    said = []
    for more in ({}, {"use_orig_params": True}):
        part = fsdp1(nn.Linear(4, 4), device_id=torch.device("cpu"), **more)
        net = nn.Sequential(nn.Linear(4, 4), part)
        for call in (
            lambda net=net: holdfast.CheckpointManager(folder, model=net),
            lambda net=net: holdfast.save(f"{folder}/one", {"model": net}),
            lambda net=net: holdfast.load(f"{folder}/one", {"model": net}),
        ):
            with pytest.raises(UsageError) as refused:
                call()
            said.append(str(refused.value))
    return said


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_refused_with_a_hint(tmp_path: Path) -> None:
    """G15. Method: pass FSDP1 with flat and with original parameters, inside another module, to
    manager, save and load."""
    for said in run_processes(2, refused_fsdp1, str(tmp_path)):
        assert len(said) == 6
        for line in said:
            assert "`1` is wrapped by FullyShardedDataParallel" in line
            assert "fully_shard" in line
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ dropout, loaders, and a kill


class Rows:
    """A map-style dataset."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((8,), float(number))


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    """Stateful iterable dataset with a shuffle buffer."""

    def __init__(self) -> None:
        self.at, self.buffer = 24, list[torch.Tensor]()

    def __iter__(self) -> Any:
        if self.at == 24:
            self.at, self.buffer = 0, [torch.full((8,), -1.0)]
        while self.at < 24:
            self.buffer.append(torch.full((8,), float(self.at)))
            self.at += 1
            if len(self.buffer) > 3:
                yield self.buffer.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "buffer": [*self.buffer]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.at, self.buffer = state_dict["at"], state_dict["buffer"]


def loader_of(kind: str, workers: int, rank: int, size: int) -> Any:
    stateful: Any = import_module("torchdata.stateful_dataloader").StatefulDataLoader
    more = {"multiprocessing_context": "fork"} if workers else {}
    if kind == "iterable":
        return stateful(Stream(), batch_size=2, num_workers=workers, **more)
    return stateful(Rows(), batch_size=2, shuffle=True, num_workers=workers, **more)


def train_on_loader(
    rank: int, size: int, folder: str, until: int, wrapper: str, kind: str, workers: int
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train with dropout over several epochs of a loader. Returns the weights and the samples
    seen."""
    torch.manual_seed(7 + rank)
    net: Any = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.5), nn.Linear(12, 8))
    if wrapper == "fsdp2":
        net = fully_shard(net)
    elif wrapper == "ddp":
        net = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loader = loader_of(kind, workers, rank, size)
    config = holdfast.CheckpointConfig(
        enable=True, interval=1, last_save_model_only=False, stop_signals=()
    )
    seen: list[float] = []
    with holdfast.CheckpointManager(
        folder, model=net, optimizers=optimizer, dataloader=loader, config=config
    ) as manager:
        step = manager.load()
        while step < until:
            for batch in loader:
                seen.append(float(batch.sum()))
                optimizer.zero_grad()
                (net(batch / 24) - batch / 24).square().mean().backward()
                optimizer.step()
                step += 1
                manager.save(step)
                if step == until:
                    break
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in net.named_parameters()
    }
    return weights, seen


LOADERS = [
    ("none", "map", 2),
    ("none", "iterable", 0),
    ("fsdp2", "iterable", 2),
    ("fsdp2", "map", 0),
]
if EVERYTHING:
    LOADERS = [
        (wrapper, kind, workers)
        for wrapper in ("none", "ddp", "fsdp2")
        for workers in (0, 2)
        for kind in ("map", "iterable")
    ]


def loader_case(
    rank: int, size: int, folder: Path, name: str, until: int, wrapper: str, kind: str, workers: int
) -> Any:
    """Run `train_on_loader` in a folder of this case."""
    out = folder / f"{wrapper}-{kind}-{workers}" / name
    return train_on_loader(rank, size, str(out), until, wrapper, kind, workers)


@pytest.fixture(scope="module")
def loader_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """Results of every case: at once, then in three parts, each part in new processes."""
    pytest.importorskip("torchdata")
    folder = tmp_path_factory.mktemp("loaders")
    results: dict[Any, list[Any]] = {case: [] for case in LOADERS}
    for name, until in (("whole", 17), ("parts", 5), ("parts", 12), ("parts", 17)):
        for size in (1, 2):
            cases = [case for case in LOADERS if (case[0] == "none") == (size == 1)]
            for case, found in run_each(size, loader_case, cases, folder, name, until).items():
                results[case].append(found)
    return results


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LOADERS, ids=lambda case: "-".join(map(str, case)))
def test_dropout_and_a_stateful_loader_resume_bit_for_bit(
    case: tuple[str, str, int], loader_runs: dict[Any, list[Any]]
) -> None:
    """G9, G15. Method: stop in the middle of an epoch and at its end, and restart. Samples and bits
    equal those of a run that never stopped."""
    whole, *parts = (of(found) for found in loader_runs[case])
    for rank, (weights, samples) in enumerate(whole):
        assert [sample for part in parts for sample in part[rank][1]] == samples
        for name, value in weights.items():
            assert torch.equal(value, parts[-1][rank][0][name]), name
