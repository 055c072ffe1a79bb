"""Bytes and time of the saves of a LoRA run, with `deduplicate` and without:
`python -m benchmarks.deduplicate --mb 200`.

The model is frozen linear layers with adapters of rank 16, which AdamW trains. A tensor counts as
changed if its bytes differ from those in the checkpoint before the previous one, whose files a save
links. The first two saves write everything, and are shown apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from holdfast import CheckpointConfig, CheckpointManager
from holdfast.format.names import step_name

WIDTH = 2048
RANK = 16
FIRST = 2
"""Saves that have no checkpoint to link files of."""


class Adapted(nn.Module):
    """A frozen linear layer with a trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(self.base(x), self.up(self.down(x)))


class SaveCost(NamedTuple):
    """Cost of one save."""

    written_bytes: int
    changed_bytes: int
    seconds: float
    cpu_seconds: float


def train(folder: Path, nbytes: int, num_saves: int, *, deduplicate: bool) -> list[SaveCost]:
    """Train one step before each save. Returns the cost of each save."""
    torch.manual_seed(0)
    num_layers = max(1, nbytes // (4 * WIDTH * WIDTH))
    layers = [Adapted() for _ in range(num_layers)]
    model = nn.Sequential(*layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=3, deduplicate=deduplicate)
    # The adapters and two moments of each; counters of steps are 4 bytes a parameter.
    changed = sum(3 * 4 * parameter.numel() + 4 for parameter in trained)
    whole = changed + sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    costs, known = [], set[int]()
    with CheckpointManager(folder, model=model, optimizers=optimizer, config=config) as manager:
        for step in range(1, num_saves + 1):
            optimizer.zero_grad()
            model(torch.randn(4, WIDTH)).square().mean().backward()
            optimizer.step()
            started, cpu_started = time.perf_counter(), time.process_time()
            manager.save(step)
            seconds = time.perf_counter() - started
            cpu_seconds = time.process_time() - cpu_started
            files = [path.stat() for path in (folder / step_name(step)).iterdir()]
            written = sum(status.st_size for status in files if status.st_ino not in known)
            # Retention deletes files, whose inodes may be used again.
            known = {path.stat().st_ino for path in folder.glob("step-*/*")}
            costs.append(
                SaveCost(written, changed if step > FIRST else whole, seconds, cpu_seconds)
            )
    return costs


def main() -> None:
    """Print a row for the first saves and one for the others, with `deduplicate` and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=int, default=200, help="MB of frozen weights")
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    print("| deduplicate | saves | MB written | MB changed | ratio | ms | CPU ms |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    for deduplicate in (False, True):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            costs = train(Path(folder), options.mb * 10**6, options.saves, deduplicate=deduplicate)
        for name, part in (("first two", costs[:FIRST]), ("others", costs[FIRST:])):
            written = median(cost.written_bytes for cost in part)
            changed = median(cost.changed_bytes for cost in part)
            cells = [
                "yes" if deduplicate else "no",
                name,
                f"{written / 1e6:.2f}",
                f"{changed / 1e6:.2f}",
                f"{written / changed:.3f}",
                f"{1e3 * median(cost.seconds for cost in part):.0f}",
                f"{1e3 * median(cost.cpu_seconds for cost in part):.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
