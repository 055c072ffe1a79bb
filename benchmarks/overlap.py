"""Cost of a background save for training: `python -m benchmarks.overlap`.

One process trains with AdamW on the CPU. Each system in turn saves once, to create its buffers and
processes. Then training takes three groups of steps: without a save, with a save until it is
durable, and again without.

Columns: `lost_s` is the time of the steps with the save, less the time that as many steps take
without one. `slowed_pct` is `lost_s` in percent of the latter. `blocked_s` is the time until the
save call returned. `durable_s` is the time from the call until all data was on the disk.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.background import Background, systems
from benchmarks.meter import Figure, round_order
from benchmarks.options import BenchmarkOptions
from benchmarks.ranks import free_port
from benchmarks.results import Section, measure_parts
from benchmarks.saving import renew

NUM_LAYERS, BATCH = 288, 32
"""As many matrices as in a Llama of 8B, since the time that a save costs training grows with the
number of tensors."""

PLAIN_STEPS = 3
"""Steps without a save, measured before and after the save, since the speed of a shared machine
changes slowly."""

STEPS_MIN = 2
"""Least number of steps with a save; more if it is not durable by then."""

Optimizing = Callable[[], AbstractContextManager[object]]


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next step, as a GPU's allocator does.

    Otherwise it returns the memory to the system, and faulting it in again takes a varying third of
    each step.
    """
    mmap_threshold, trim_threshold = -3, -1  # From glibc's malloc.h; its maximum is 32 MiB.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


class Layer(nn.Linear):
    """Linear layer with norm and residual connection, which keep activations and gradients from
    vanishing.

    Vanishing numbers become denormal, and denormal numbers slow a processor down.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + super().forward(nn.functional.rms_norm(inputs, inputs.shape[-1:]))


class Training:
    """Model with `nbytes` of training state, and its optimizer."""

    def __init__(self, nbytes: int) -> None:
        # An element takes 12 bytes: the weight and two moments, 4 bytes each.
        width = max(64, round((nbytes / (12 * NUM_LAYERS)) ** 0.5 / 64) * 64)
        self.model = nn.Sequential(*(Layer(width, width, bias=False) for _ in range(NUM_LAYERS)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self._inputs = torch.randn(BATCH, width)
        self.step(nullcontext)
        self.nbytes = 12 * sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, optimizing: Optimizing) -> float:
        """Take one optimizer step, and return its seconds."""
        started = time.perf_counter()
        self.model(self._inputs).square().mean().backward()
        with optimizing():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def measure(self, system: Background) -> Figure:
        """Measure steps without a save and with one."""
        system.start()
        system.finish()
        plain_s = [self.step(nullcontext) for _ in range(PLAIN_STEPS)]
        called, num_steps = time.perf_counter(), 0
        system.start()
        blocked_s = time.perf_counter() - called
        with ThreadPoolExecutor(1) as pool:
            durable = pool.submit(_finish, system)
            while num_steps < STEPS_MIN or not durable.done():
                self.step(system.optimizing)
                num_steps += 1
            steps_s = time.perf_counter() - called
            durable_s = durable.result() - called
        plain_s += [self.step(nullcontext) for _ in range(PLAIN_STEPS)]
        step_s = statistics.mean(plain_s)
        lost_s = steps_s - step_s * num_steps
        return {
            "lost_s": lost_s,
            "blocked_s": blocked_s,
            "durable_s": durable_s,
            "slowed_pct": 100 * lost_s / (step_s * num_steps),
            "step_s": step_s,
        }


def _finish(system: Background) -> float:
    system.finish()
    return time.perf_counter()


def overlap(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure all systems in turn."""
    keep_freed_memory()
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    training, makes = Training(options.nbytes), systems()
    figures: dict[str, list[Figure]] = {name: [] for name in makes}
    for number in range(options.rounds):
        for name in round_order(list(makes), number):
            renew(folder)
            system = makes[name](training.model, training.optimizer, folder)
            figures[name].append(training.measure(system))
            system.close()
    method = (
        f"One process trains on the CPU, {training.nbytes / 1e9:.2f} GB of parameters and moments. "
        "`lost`: time of the steps until the save was durable, less the time of as many steps "
        "without a save."
    )
    facts = {"nbytes": training.nbytes}
    return Section("overlap", "Saving while training continues", method, figures, facts)


if __name__ == "__main__":
    measure_parts(__doc__, {"overlap": overlap})
