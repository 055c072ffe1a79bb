"""What a save in the background costs training: `python -m benchmarks.overlap`.

One process trains with AdamW on the CPU. In its turn each system saves once, which makes its
buffers and processes, then training goes on without a save, then with one, until that is durable.
`lost_s` is what those last steps took beyond as many without a save, by the mean of the steps just
before and just after them; `slowed_pct` the same as a share of them; `blocked_s` how long the call
took to return; `durable_s` when all was on the disk, from the call on.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.asked import Asked, asked, quiet
from benchmarks.background import Background, systems
from benchmarks.meter import Figure, turns
from benchmarks.ranks import free_port
from benchmarks.results import Section, store
from benchmarks.saving import renew

NUM_LAYERS, BATCH = 288, 32
"""As many matrices as a Llama of 8B has: what a save does for each is what training waits for."""

PLAIN_STEPS = 3
"""Without a save, before and again after: a machine that others share is faster or slower from
minute to minute."""

STEPS_MIN = 2
"""With a save; more where it is not durable by then."""

Optimizing = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system took in one round."""

    plain_s: list[float]
    """Each step without a save."""

    num_steps: int
    """From the save on."""

    steps_s: float
    blocked_s: float
    durable_s: float

    def figure(self) -> Figure:
        """What is told of it."""
        step_s = statistics.mean(self.plain_s)
        plain_s = step_s * self.num_steps
        lost_s = self.steps_s - plain_s
        return {
            "lost_s": lost_s,
            "blocked_s": self.blocked_s,
            "durable_s": self.durable_s,
            "slowed_pct": 100 * lost_s / plain_s,
            "step_s": step_s,
        }


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one, as the allocator of a GPU does.
    Given back and faulted in anew it took a third of each step, now more, now less."""
    mmap_threshold, trim_threshold = -3, -1  # Of glibc's malloc.h; 32 MiB is the most it takes.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


class Layer(nn.Linear):
    """Keeps activations and gradients of one size however many layers there are. Left to vanish
    they become denormal numbers, on which a processor is slow, and slower from step to step."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + super().forward(nn.functional.rms_norm(inputs, inputs.shape[-1:]))


class Training:
    """A model of some size, and its optimizer."""

    def __init__(self, nbytes: int) -> None:
        # Of a matrix: itself and two moments, 4 bytes each.
        width = max(64, round((nbytes / (12 * NUM_LAYERS)) ** 0.5 / 64) * 64)
        self.model = nn.Sequential(*(Layer(width, width, bias=False) for _ in range(NUM_LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._inputs = torch.randn(BATCH, width)
        self.step(nullcontext)
        self.nbytes = 12 * sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, optimizing: Optimizing) -> float:
        """Forward, backward, and a step of the optimizer. How long it took."""
        started = time.perf_counter()
        self.model(self._inputs).square().mean().backward()
        with optimizing():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def turn(self, system: Background) -> Turn:
        """Steps without a save and with one."""
        system.start()
        system.finish()
        plain_s = [self.step(nullcontext) for _ in range(PLAIN_STEPS)]
        called, num_steps = time.perf_counter(), 0
        system.start()
        blocked_s = time.perf_counter() - called
        with ThreadPoolExecutor(1) as pool:
            durable = pool.submit(_finished, system)
            while num_steps < STEPS_MIN or not durable.done():
                self.step(system.optimizing)
                num_steps += 1
            steps_s = time.perf_counter() - called
            durable_s = durable.result() - called
        plain_s += [self.step(nullcontext) for _ in range(PLAIN_STEPS)]
        return Turn(plain_s, num_steps, steps_s, blocked_s, durable_s)


def _finished(system: Background) -> float:
    system.finish()
    return time.perf_counter()


def overlap(given: Asked, folder: Path) -> Section:
    """All systems by turns."""
    keep_freed_memory()
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    training, makes = Training(given.nbytes), systems()
    found: dict[str, list[Figure]] = {name: [] for name in makes}
    for number in range(given.rounds):
        for name in turns(list(makes), number):
            renew(folder)
            system = makes[name](training.model, training.optimizer, folder)
            found[name].append(training.turn(system).figure())
            system.close()
    method = (
        f"One process trains on the CPU, {training.nbytes / 1e9:.2f} GB of parameters and moments. "
        "Lost: what the steps until the save was durable took beyond as many without one."
    )
    facts = {"nbytes": training.nbytes}
    return Section("overlap", "Saving while training goes on", method, found, facts)


def main() -> None:
    """Measure, and keep what was found."""
    given = asked(__doc__, ("overlap",))
    quiet()
    with given.place() as folder:
        store(overlap(given, folder), given.out, add=given.add)


if __name__ == "__main__":
    main()
