"""Time of `holdfast list` on 50 checkpoints of 1 GB: `python -m benchmarks.listing`.

One checkpoint is saved. The others have copies of its index and hard links to its data, which
`list` does not read. Times are those of a whole process, the start of Python included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import holdfast
from benchmarks.meter import Figure, measure_command, run_rounds
from benchmarks.options import BenchmarkOptions
from benchmarks.results import Section, measure_parts
from benchmarks.states import llama_like, local_bytes

NUM_CHECKPOINTS = 50
CHECKPOINT_BYTES = 10**9
SCRIPT = "import sys; from holdfast.cli.main import main; sys.exit(main())"


def listing(options: BenchmarkOptions, folder: Path) -> Section:
    """Measure `holdfast list`, and a Python process that does nothing."""
    state = llama_like(min(options.nbytes, CHECKPOINT_BYTES))
    holdfast.save(folder / "step-1", state)
    for number in range(2, NUM_CHECKPOINTS + 1):
        shutil.copytree(folder / "step-1", folder / f"step-{number}", copy_function=_copy_or_link)
    command = [sys.executable, "-c", SCRIPT, "list", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.count(" good") == NUM_CHECKPOINTS, output

    # Bytecode is cached by the first round, as for an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run(*command: str) -> Figure:
        return measure_command(
            lambda: subprocess.run(command, check=True, capture_output=True, env=environment)
        )

    systems = {
        "python -c pass": lambda: run(sys.executable, "-c", "pass"),
        "holdfast list": lambda: run(*command),
    }
    nbytes = local_bytes(state)
    method = f"{NUM_CHECKPOINTS} checkpoints of {nbytes / 1e9:.2f} GB, {len(state)} tensors each."
    figures = run_rounds(systems, options.rounds)
    return Section("listing", "Listing checkpoints", method, figures, {"nbytes": nbytes})


def _copy_or_link(source: str, target: str) -> None:
    if source.endswith(".distcp"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    measure_parts(__doc__, {"listing": listing})
