"""Twenty runs for the tests of the page about all runs: many kinds, and each state."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import holdfast.dashboard.watch as watch
from holdfast.catalog.seal import write_seal
from holdfast.dashboard.condition import Limits
from holdfast.dashboard.watch import Fleet
from holdfast.dashboard.web import server_of
from holdfast.format.manifest import Kind, Manifest, Table
from holdfast.format.timings import Stage
from holdfast.timing import Times
from manifest_bytes import encode

HOUR = 3600.0


def add_checkpoint(
    folder: Path, step: int, *, created: float, nbytes: int = 7_100_000_000, kind: Kind = "full"
) -> Path:
    """Make a checkpoint of two ranks with sparse files, without tensors. Returns its folder."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    sizes = {f"__{rank}_0.distcp": nbytes // 2 for rank in range(2)}
    for name, size in sizes.items():
        with (path / name).open("wb") as file:
            file.truncate(size)
    stage = Stage(least=3.0, median=4.0, most=nbytes / 1.3e9, slowest=1)
    manifest = Manifest(
        {},
        {},
        files=sizes,
        tables={name: Table(offset=size, checksum=0) for name, size in sizes.items()},
        step=step,
        kind=kind,
        created=datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds"),
        layout={"world_size": 2},
        timings={"write": stage},
    )
    (path / "manifest.json").write_bytes(encode(manifest))
    return path


def add_run(
    folder: Path,
    *,
    now: float,
    age_s: float,
    interval_s: float = 0.5 * HOUR,
    num_saves: int = 6,
    first_step: int = 10_000,
    nbytes: int = 7_100_000_000,
    loss: float = 2.4,
) -> Path:
    """Make a run whose last save, every 500 steps, is `age_s` old, with metrics. Returns its
    folder of checkpoints."""
    checkpoints = folder / "checkpoint"
    steps = [first_step + 500 * number for number in range(num_saves)]
    saved_at = [now - age_s - interval_s * number for number in reversed(range(num_saves))]
    for step, created in zip(steps, saved_at, strict=True):
        add_checkpoint(checkpoints, step, created=created, nbytes=nbytes)
    rows = []
    noise = random.Random(folder.name)
    step_s = interval_s / 500
    last_step = steps[-1] + int(min(age_s, interval_s) / step_s)
    for step in range(steps[0], last_step + 1, 25):
        progress = (step - steps[0]) / (500 * num_saves)
        row = _row(
            step,
            time=saved_at[0] + (step - steps[0]) * step_s,
            loss=loss * (1.15 - 0.15 * progress) + noise.gauss(0, 0.02 * loss),
            blocked_s=nbytes / 40e9 if step % 500 == 25 else 0.0,
        )
        if step % 500 == 25:
            stage = Stage(least=3.0, median=4.0, most=nbytes / 1.3e9, slowest=1)
            times = Times(step - 25, nbytes, nbytes / 1.3e9, {"write": stage})
            row["saves"] = [asdict(times)]
        rows.append(row)
    write_metrics(folder, rows)
    return checkpoints


def write_metrics(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the metrics of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(step: int, *, time: float, loss: float, blocked_s: float) -> dict[str, Any]:
    row = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "time": time}
    return {**row, "tokens_per_s": 4e5, "save_blocked_s": blocked_s}


def add_trainer_run(folder: Path, *, now: float, is_finished: bool = False) -> Path:
    """Make sealed checkpoints as transformers' Trainer saves them. Returns the folder."""
    for step in (500, 1000, 1500):
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        with (path / "model.safetensors").open("wb") as file:
            file.truncate(3_000_000)
        log = [{"step": s, "loss": 3.0 * math.exp(-s / 900) + 1} for s in range(10, step + 1, 10)]
        state = {
            "log_history": log,
            "global_step": step,
            "max_steps": 1500 if is_finished else 9000,
        }
        (path / "trainer_state.json").write_text(json.dumps(state))
        write_seal(path)
        _date_seal(path / "holdfast.seal", now - (1500 - step) * 3 - 400)
    return folder


def _date_seal(path: Path, created: float) -> None:
    from holdfast.format import seal as seals

    seal = seals.decode(path.read_bytes(), where=str(path))
    when = datetime.fromtimestamp(created, UTC).isoformat(timespec="seconds")
    path.write_bytes(seals.encode(seals.Seal(seal.files, when, seal.versions)))


GOOD = (
    "llama3-8b-base",
    "llama3-8b-long",
    "llama3-70b-sft",
    "qwen3-4b-lr3e-4",
    "qwen3-4b-lr1e-4",
    "moe-8x7b-a",
    "moe-8x7b-b",
    "vit-l-16-aug",
    "whisper-small-de",
)
"""Names of the runs without problems."""

NUM_RUNS = 20


def add_fleet(root: Path, now: float) -> None:
    """Make twenty runs below `root`: nine good ones, and each other state once or more."""
    for number, name in enumerate(GOOD):
        add_run(
            root / name,
            now=now,
            age_s=(0.1 + 0.13 * number) * 0.5 * HOUR,
            interval_s=(0.25 + 0.25 * (number % 3)) * HOUR,
            first_step=2_500 * (number * 7 % 10 + 1),
            nbytes=1_900_000_000 * (number + 1),
            loss=1.9 + 0.17 * number,
        )
    damaged = add_run(root / "qwen3-14b-dpo", now=now, age_s=0.2 * HOUR)
    (damaged / "step-12500" / "__1_0.distcp").unlink()
    marked = add_run(root / "gemma3-12b-cpt", now=now, age_s=0.3 * HOUR, first_step=31_000)
    (marked / ".damaged-step-32000").write_text("`__0_0.distcp` `model.norm` block 3 has checksum")
    every = add_run(root / "toy-ablation-07", now=now, age_s=0.3 * HOUR, num_saves=2, nbytes=10**8)
    for path in every.glob("step-*/manifest.json"):
        path.write_bytes(path.read_bytes()[:100])
    add_run(root / "moe-64x1b-c", now=now, age_s=4.2 * HOUR)
    add_run(root / "t5-xl-summaries", now=now, age_s=52 * HOUR, interval_s=2 * HOUR)
    write_metrics(
        root / "llama3-8b-restart",
        [_row(s, time=now - 900 + s, loss=11 - s / 100, blocked_s=0) for s in range(0, 340, 10)],
    )
    (root / "llama3-8b-restart/checkpoint").mkdir()
    (root / "llama3-8b-restart/checkpoint/.lock").write_text("host node-7, pid 4242")
    writing = add_run(root / "mamba2-3b", now=now, age_s=0.5 * HOUR)
    (writing / ".attempt-step-13000-0123abcd").mkdir()
    diverged = add_run(root / "vit-h-14-bf16", now=now, age_s=0.1 * HOUR, loss=4.0)
    rows = [_row(12_900, time=now - 60, loss=math.nan, blocked_s=0)]
    with (diverged.parent / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    finished = add_run(root / "llama3-1b-final", now=now, age_s=70 * HOUR)
    add_checkpoint(finished, 13_000, created=now - 69 * HOUR, kind="model")
    add_trainer_run(root / "trainer-mistral-lora", now=now)
    vanished = root / "scratch-run-3"
    add_run(vanished, now=now, age_s=0.4 * HOUR)
    assert len([*root.iterdir()]) == NUM_RUNS


def remove_run(root: Path) -> None:
    """Delete the run that is to vanish while the server runs."""
    shutil.rmtree(root / "scratch-run-3")


def age(path: Path, time: float) -> None:
    """Set the time of the last change of a file or folder."""
    os.utime(path, (time, time))


def read_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all folders be read and searched often."""
    for name in ("READ_S", "READ_BUCKET_S", "SEARCH_S", "SEARCH_BUCKET_S"):
        monkeypatch.setattr(watch, name, 0.1)
    monkeypatch.setattr(watch, "CPU_SHARE", 10.0)
    monkeypatch.setattr(watch, "SEARCH_CPU_SHARE", 10.0)
    monkeypatch.setattr(watch, "READ_SHARE", 1.0)


def wait_for(found: Callable[[], object], expected: object, *, timeout_s: float = 30) -> None:
    """Wait until a function returns the expected value."""
    deadline = time.monotonic() + timeout_s
    while (value := found()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value == expected


@contextmanager
def watched(*folders: Path | str) -> Iterator[Fleet]:
    """Watch the runs below folders. The context begins once each has been read."""
    fleet = Fleet([str(folder) for folder in folders])
    try:
        wait_for(lambda: {bool(run.latest.time) for run in fleet.runs.values()}, {True})
        yield fleet
    finally:
        fleet.stop()


@contextmanager
def served(root: Path | str) -> Iterator[str]:
    """Serve the runs below `root` from a thread. The context gives the address."""
    with watched(root) as fleet, socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(fleet, {"localhost"}, Limits(), None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)
