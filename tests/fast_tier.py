"""A run with a fast tier: ranks as threads that pretend to be on several hosts, each with its own
disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import Ranks
from holdfast.testing.ranks import run_ranks

HOSTS = ["node0", "node0", "node1", "node2"]


class Run:
    """A run of some ranks, whose state says at which step it is."""

    def __init__(self, root: Path, hosts: Sequence[str] = HOSTS, **settings: Any) -> None:
        self.root, self.hosts = root, hosts
        self.config = CheckpointConfig(
            enable=True,
            **{
                "interval": 4,
                "local_interval": 2,
                "local_folder": f"{root}/disks/{{host}}",
                "last_save_model_only": False,
                **settings,
            },
        )

    def each(self, work: Callable[[CheckpointManager, State, int], Any], **more: Any) -> list[Any]:
        """Run `work(manager, state, resumed)` on every rank."""

        def rank(ranks: Ranks) -> Any:
            torch.manual_seed(0)
            state = State(ranks.rank)
            with CheckpointManager(
                self.root / "run",
                model=state.model,
                states={"own": state},
                config=self.config,
                ranks=ranks,
                **more,
            ) as manager:
                return work(manager, state, manager.load())

        return run_ranks(len(self.hosts), rank, hosts=self.hosts)

    def train(self, steps: int, **more: Any) -> list[int]:
        """Train up to a step, as if all processes were killed after it. Returns the step that each
        rank resumed from."""

        def loop(manager: CheckpointManager, state: State, resumed: int) -> int:
            state.check(int(resumed))
            for step in range(resumed + 1, steps + 1):
                state.step(step)
                manager.save(step)
            return int(resumed)

        return self.each(loop, **more)

    def resumes_from(self) -> int:
        """The step that a restart resumes from, with the state of that step on every rank."""
        (step,) = set(self.train(0))
        return step

    def disk(self, host: str) -> Path:
        """The folder of the run on the disk of a host."""
        (folder,) = (self.root / "disks" / host).iterdir()
        return folder

    def local(self, host: str = "node0") -> set[str]:
        """Steps on the disk of a host."""
        return {path.name for path in self.disk(host).glob("step-*")}

    @property
    def durable(self) -> set[str]:
        """Steps in the folder of the run."""
        return {path.name for path in (self.root / "run").glob("step-*")}


class State:
    """A model that all ranks share, and a state of each rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.model = rank, torch.nn.Linear(40, 50)
        self.own = torch.zeros(3000)

    def step(self, step: int) -> None:
        """Set everything to numbers that depend on the step."""
        with torch.no_grad():
            self.model.weight.fill_(step)
        self.own = torch.arange(3000.0) + step * 10 + self.rank

    def check(self, step: int) -> None:
        """Check that everything is of this step."""
        if step:
            assert (self.model.weight == step).all()
            assert torch.equal(self.own, torch.arange(3000.0) + step * 10 + self.rank)

    def state_dict(self) -> dict[str, Any]:
        return {f"rank_{self.rank}": self.own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own = state[f"rank_{self.rank}"]
