"""What a save in the background costs training: `python -m benchmarks.overlap`.

One process trains with AdamW on the CPU. By turns each system saves once in the middle of so many
steps; `none` saves nothing. Lost is the time of these steps beyond that of the round's steps
without a save; blocked is how long the call took to return; durable is when all was on the disk,
from the call on.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.meter import machine
from benchmarks.saving import durably
from holdfast import CheckpointConfig, CheckpointManager

WIDTH = 2048
STEPS = 8
"""A round; the save comes after the second."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one round of one system took."""

    steps_s: float
    blocked_s: float = 0.0
    durable_s: float = 0.0


class Training:
    """A model of some size, and its optimizer."""

    def __init__(self, gb: float) -> None:
        num_layers = max(1, int(gb * 1e9 / (12 * WIDTH * WIDTH)))
        self.model = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers))
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._inputs = torch.randn(64, WIDTH)
        self.step()
        self.nbytes = 12 * sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        """Forward, backward, and a step of the optimizer."""
        self.model(self._inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, save: Callable[[], Callable[[], object]] | None) -> Turn:
        """A round of steps. `save` starts a save, and gives what waits for it."""
        started, blocked_s, called, wait = time.perf_counter(), 0.0, 0.0, None
        for number in range(STEPS):
            self.step()
            if number == 1 and save is not None:
                called = time.perf_counter()
                wait = save()
                blocked_s = time.perf_counter() - called
        steps_s = time.perf_counter() - started
        if wait is None:
            return Turn(steps_s)
        wait()
        return Turn(steps_s, blocked_s, time.perf_counter() - called)


class Ours:
    """A manager that saves whenever it is asked."""

    def __init__(self, training: Training, folder: Path, mode: Any) -> None:
        config = CheckpointConfig(enable=True, interval=1, async_mode=mode, keep_latest_k=2)
        self._step = 0
        self.manager = CheckpointManager(
            folder, model=training.model, optimizers=training.optimizer, config=config
        )

    def save(self) -> Callable[[], object]:
        """Start a save of the next step."""
        self._step += 1
        self.manager.save(self._step)
        return self.manager.wait


def stock(training: Training, folder: Path) -> Callable[[], object]:
    """Start a save by `async_save`, in its thread."""
    shutil.rmtree(folder, ignore_errors=True)
    state = {
        "model": get_model_state_dict(training.model),
        "optimizer": get_optimizer_state_dict(training.model, training.optimizer),
    }
    future: Any = async_save(state, checkpoint_id=folder)
    return lambda: durably(lambda _: future.result(), folder)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    training = Training(asked.gb)
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = Path(place)
        modes = ("async", "async_with_pinned_mem")
        ours = {mode: Ours(training, folder / mode, mode) for mode in modes}
        ways: dict[str, Callable[[], Turn]] = {
            "none": lambda: training.turn(None),
            "dcp.async_save": lambda: training.turn(lambda: stock(training, folder / "stock")),
            **{
                f"holdfast, {mode}": lambda held=held: training.turn(held.save)  # type: ignore[misc]
                for mode, held in ours.items()
            },
        }
        turns: dict[str, list[Turn]] = {name: [] for name in ways}
        for number in range(asked.rounds + 1):
            for name, way in ways.items():
                turn = way()
                if number:
                    turns[name].append(turn)
        for held in ours.values():
            held.manager.close()
    lines = table(training, turns, asked.rounds)
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
    if asked.out:
        asked.out.write_text("\n".join(lines) + "\n")


def table(training: Training, turns: dict[str, list[Turn]], rounds: int) -> list[str]:
    """A row a system, medians over the rounds."""
    plain = [turn.steps_s for turn in turns["none"]]
    lines = [
        f"{machine()}; {training.nbytes / 1e9:.2f} GB, {rounds} rounds of {STEPS} steps, a step "
        f"{statistics.median(plain) / STEPS:.2f} s",
        "",
        "| system | lost a save, s | blocked, s | durable after, s |",
        "|---|---|---|---|",
    ]
    for name, found in turns.items():
        if name == "none":
            continue
        lost = statistics.median(t.steps_s - p for t, p in zip(found, plain, strict=True))
        blocked = statistics.median(turn.blocked_s for turn in found)
        durable = statistics.median(turn.durable_s for turn in found)
        lines.append(f"| {name} | {lost:.2f} | {blocked:.3f} | {durable:.2f} |")
    return lines


if __name__ == "__main__":
    main()
