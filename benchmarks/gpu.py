"""Saving and loading on one accelerator: `python -m benchmarks.gpu`.

A model trains on the device, and each system saves it twice while training goes on. Beside them:
the rate of the link between device and host, loads from the page cache and from the disk, and a
resume that must give the same bits. `--device cpu` tries the same on a machine without one.

* `first blocked`: time until the first `save` of a process returns; the other figures are those of
  the second save. `lost`: time of the steps until the save was durable, less the time of as many
  steps without a save. `copy`: rate of the copy to host memory.
* After 5 minutes no other system is begun. Those that are left are named.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.background import (
    Background,
    DCPAsync,
    DCPSave,
    HoldfastAsync,
    Make,
    TorchCheckpointingAsync,
    is_installed,
)
from benchmarks.disk import cool_cache, warm_cache
from benchmarks.meter import Figure, machine
from benchmarks.options import RESULTS, silence_warnings
from benchmarks.overlap import Layer, Optimizing
from benchmarks.plots import Bar, bar_chart
from benchmarks.ranks import free_port
from benchmarks.results import Section, save_section
from holdfast import CheckpointConfig, CheckpointManager

WIDTH = 2048
BYTES_PER_ELEMENT = 12
"""A weight and two moments, 4 bytes each."""

SECONDS_MAX = 300.0
"""Seconds after which no further system is measured; the one in progress takes less than one more
minute."""

PLAIN_STEPS = 6
LINK_BYTES = 1 << 30

COLUMNS = {
    "first_blocked_s": "first blocked, s",
    "blocked_s": "blocked, s",
    "lost_s": "lost, s",
    "durable_s": "durable after, s",
    "copy_gb_per_s": "copy, GB/s",
}


class Training:
    """Model on a device, and its optimizer."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device = device
        self._is_cpu = device.type == "cpu"
        num_layers = max(1, round(nbytes / (BYTES_PER_ELEMENT * WIDTH * WIDTH)))
        torch.manual_seed(0)
        layers = (Layer(WIDTH, WIDTH, bias=False, device=device) for _ in range(num_layers))
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=not self._is_cpu)
        self._inputs = torch.randn(16 if self._is_cpu else 16384, WIDTH, device=device)
        self.step()
        self.nbytes = BYTES_PER_ELEMENT * num_layers * WIDTH * WIDTH

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self._is_cpu:
            torch.accelerator.synchronize(self.device)

    def step(self, optimizing: Optimizing = nullcontext) -> float:
        """Take one optimizer step, and return its seconds."""
        self.synchronize()
        started = time.perf_counter()
        narrow = nullcontext() if self._is_cpu else torch.autocast(self.device.type, torch.bfloat16)
        with narrow:
            loss = self.model(self._inputs).float().square().mean()
        loss.backward()
        with optimizing():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        return time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """The state, as stock names it."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def save_once(self, system: Background) -> Figure:
        """Save while training goes on, and measure it."""
        plain = [self.step() for _ in range(PLAIN_STEPS)]
        started, num_steps = time.perf_counter(), 0
        system.start()
        blocked_s = time.perf_counter() - started

        def finish() -> float:
            system.finish()
            return time.perf_counter() - started

        with ThreadPoolExecutor(1) as pool:
            durable = pool.submit(finish)
            while num_steps < 3 or not durable.done():
                self.step(system.optimizing)
                num_steps += 1
            steps_s = time.perf_counter() - started
        plain += [self.step() for _ in range(PLAIN_STEPS)]
        lost_s = steps_s - statistics.median(plain) * num_steps
        return {"blocked_s": blocked_s, "lost_s": lost_s, "durable_s": durable.result()}

    def measure(self, make: Make, folder: Path) -> Figure:
        """Figures of two saves of one system."""
        folder.mkdir()
        system = make(self.model, self.optimizer, folder)
        first, second = self.save_once(system), self.save_once(system)
        copy_s = system.copy_s() if isinstance(system, HoldfastAsync) else 0.0
        system.close()
        return {
            "first_blocked_s": first["blocked_s"],
            **second,
            "copy_gb_per_s": self.nbytes / copy_s / 1e9 if copy_s else 0.0,
        }


def systems(device: torch.device) -> dict[str, Make]:
    """The installed systems by name."""
    process = AsyncCheckpointerType.PROCESS
    # Without an accelerator there is no page-locked memory.
    pinned = partial(DCPAsync, pinned=device.type != "cpu")
    found: dict[str, Make] = {
        "holdfast, async_with_pinned_mem": partial(HoldfastAsync, mode="async_with_pinned_mem"),
        "holdfast, async": partial(HoldfastAsync, mode="async"),
        "holdfast, disabled": partial(HoldfastAsync, mode="disabled"),
        "dcp.save": DCPSave,
        "dcp.async_save, pinned": pinned,
        "dcp.async_save, pinned, staged in a thread": partial(pinned, staged=True),
        "dcp.async_save, pinned, process": partial(pinned, staged=True, shared=True, kind=process),
    }
    if is_installed("torch_checkpointing"):
        found["torch_checkpointing"] = TorchCheckpointingAsync
    return found


def link_rates(device: torch.device, nbytes: int) -> dict[str, float]:
    """GB/s of copies between the device and host memory, by name."""
    is_cpu = device.type == "cpu"
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pageable = torch.empty(nbytes, dtype=torch.uint8)
    locked = pageable if is_cpu else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if not is_cpu:
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return nbytes / statistics.median(seconds[1:]) / 1e9

    return {
        "device to host, page-locked": rate(locked, on_device),
        "host to device, page-locked": rate(on_device, locked),
        "device to host, pageable": rate(pageable, on_device),
    }


def load_rates(training: Training, folder: Path) -> dict[str, float]:
    """GB/s of loads of the whole state, by name; each is the median of three, or one from the
    disk."""
    ours, stock = folder / "holdfast", folder / "dcp"
    config = CheckpointConfig(enable=True, interval=1, last_save_model_only=False)
    objects: dict[str, Any] = {"model": training.model, "optimizers": training.optimizer}
    rates = {}
    with CheckpointManager(ours, config=config, **objects) as manager:
        manager.save(1)
        dcp = DCPSave(training.model, training.optimizer, stock)
        stock.mkdir()
        dcp.start()
        loads: dict[str, tuple[Path, Callable[[], object]]] = {
            "holdfast": (ours, manager.load),
            "dcp": (stock, lambda: dcp_load(training.state(), checkpoint_id=stock)),
        }
        for name, (place, load) in loads.items():
            warm_cache(place)
            warm = statistics.median(_seconds(training, load) for _ in range(3))
            cool_cache(place)
            rates[f"{name}, from the page cache"] = training.nbytes / warm / 1e9
            rates[f"{name}, from the disk"] = training.nbytes / _seconds(training, load) / 1e9
    return rates


def _seconds(training: Training, load: Callable[[], object]) -> float:
    training.synchronize()
    started = time.perf_counter()
    load()
    training.synchronize()
    return time.perf_counter() - started


def resumes_exactly(training: Training, folder: Path) -> bool:
    """Whether three steps after a load give the same bits as three steps after the save."""
    config = CheckpointConfig(enable=True, interval=1, async_mode="async_with_pinned_mem")
    objects: dict[str, Any] = {"model": training.model, "optimizers": training.optimizer}
    with CheckpointManager(folder, config=config, **objects) as manager:
        manager.save(1)
        results = []
        for resumed in (False, True):
            if resumed:
                manager.wait()
                manager.load()
            for _ in range(3):
                training.step()
            results.append([p.detach().cpu() for p in training.model.parameters()])
    return all(map(torch.equal, *results))


def page(section: Section, rates: Mapping[str, float], notes: list[str]) -> str:
    """Page with the table of saves, and the rates."""
    lines = [f"# {section.title}", "", section.machine, "", section.method, ""]
    lines += [f"| system | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, (figure,) in section.figures.items():
        cells = [f"{figure[column]:.3f}" if figure[column] else "-" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| copies and loads | GB/s |", "|---|---|"]
    lines += [f"| {name} | {rate:.2f} |" for name, rate in rates.items()]
    lines += ["", *notes, "", "![blocked](gpu-blocked_s.svg)", "![lost](gpu-lost_s.svg)"]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace, device: torch.device) -> bool:
    """Measure everything, and write the page. Returns whether the resume was exact."""
    started = time.perf_counter()

    def say(line: str) -> None:
        sys.stdout.write(f"[{time.perf_counter() - started:4.0f} s] {line}\n")
        sys.stdout.flush()

    nbytes = int(options.gigabytes * 1e9)
    rates = link_rates(device, min(LINK_BYTES, nbytes))
    training = Training(device, nbytes)
    figures: dict[str, list[Figure]] = {}
    notes: list[str] = []
    options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        exact = resumes_exactly(training, folder / "resume")
        notes.append(f"A resume gives {'the same bits' if exact else '**other bits**'}.")
        say(notes[0])
        rates |= load_rates(training, folder)
        for line, rate in rates.items():
            say(f"{line}: {rate:.2f} GB/s")
        chosen = {n: make for n, make in systems(device).items() if options.only in n}
        for number, (system, make) in enumerate(chosen.items()):
            if time.perf_counter() - started > SECONDS_MAX:
                notes.append(f"{system}: not measured, no time was left.")
                say(notes[-1])
                continue
            try:
                figures[system] = [training.measure(make, folder / str(number))]
            except Exception as error:  # noqa: BLE001 - the other systems are still measured
                notes.append(f"{system}: failed with {type(error).__name__}: {error}")
                say(notes[-1])
                continue
            shutil.rmtree(folder / str(number))
            say(f"{system}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures[system][0].items()))
            gc.collect()
    method = (
        f"One process trains on `{device.type}`, {training.nbytes / 1e9:.2f} GB of parameters and "
        "moments. Each system saves twice; `benchmarks/gpu.py` describes the columns."
    )
    title = "Saving and loading on an accelerator"
    where = f"{device_name(device)}, {machine()}"
    section = Section("gpu", title, method, figures, {"nbytes": training.nbytes}, where)
    options.out.mkdir(parents=True, exist_ok=True)
    save_section(section, options.out, add=False)
    (options.out / "gpu.md").write_text(page(section, rates, notes))
    for column in ("blocked_s", "lost_s"):
        bars = [Bar(n, f[column], f[column], f[column]) for n, (f,) in figures.items()]
        plot = bar_chart(f"{title}: {COLUMNS[column]}", bars)
        (options.out / f"gpu-{column}.svg").write_text(plot)
    return exact


def device_name(device: torch.device) -> str:
    """Model of the device."""
    if device.type == "cpu":
        return "no accelerator"
    return str(torch.get_device_module(device).get_device_name(device))


def chosen_device(options: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """Return the device to measure. Exit with status 2 if there is none of the requested kind."""
    if options.device == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or options.device not in ("", found.type):
        kind = f" of kind `{options.device}`" if options.device else ""
        there = "none" if found is None else f"`{found.type}`"
        parser.error(f"no accelerator{kind}, found: {there}; --device cpu runs without one")
    return torch.device(found.type, 0)


def main(arguments: list[str]) -> int:
    """Run the benchmark. Returns 0; 1 if a resume gave other bits. Exits with 2 if an argument is
    wrong, or without an accelerator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="", help="kind of device; default: the accelerator")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the training state")
    parser.add_argument("--only", default="", help="part of the names of the systems to measure")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="on the disk measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    device = chosen_device(options, parser)
    if not options.gigabytes > 0:
        parser.error(f"--gigabytes must be greater than 0, found: {options.gigabytes}")
    names = list(systems(device))
    if not any(options.only in name for name in names):
        parser.error(f"--only: no system has `{options.only}` in its name: {'; '.join(names)}")
    if device.type != "cpu":
        torch.accelerator.set_device_index(0)
    silence_warnings()
    address = f"tcp://127.0.0.1:{free_port()}"
    # Stock's `async_save` needs a backend for host memory.
    dist.init_process_group("cpu:gloo", rank=0, world_size=1, init_method=address)
    try:
        return 0 if run(options, device) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
