"""`holdfast list` on 50 steps of 1 GB, a process of its own: `python -m benchmarks.listing`.

One step is saved; the others are links to its data with indexes of their own, since data is not
read. Times are those of the whole process, the start of Python included.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.asked import Asked, asked, quiet
from benchmarks.meter import Figure, in_turns, measure_command
from benchmarks.results import Section, store
from benchmarks.states import held_bytes, llama_like

NUM_STEPS = 50
STEP_BYTES = 10**9
SCRIPT = "import sys; from holdfast.cli.main import main; sys.exit(main())"


def listing(given: Asked, folder: Path) -> Section:
    """Beside a Python that does nothing."""
    import holdfast

    state = llama_like(min(given.nbytes, STEP_BYTES))
    holdfast.save(folder / "step-1", state)
    for number in range(2, NUM_STEPS + 1):
        shutil.copytree(folder / "step-1", folder / f"step-{number}", copy_function=_copied)
    command = [sys.executable, "-c", SCRIPT, "list", str(folder)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert listed.count(" good") == NUM_STEPS, listed

    # As an installed package does, the first one leaves its bytecode for the others.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run(*command: str) -> Figure:
        return measure_command(
            lambda: subprocess.run(command, check=True, capture_output=True, env=environment)
        )

    ways = {
        "python -c pass": lambda: run(sys.executable, "-c", "pass"),
        "holdfast list": lambda: run(*command),
    }
    method = f"{NUM_STEPS} steps of {held_bytes(state) / 1e9:.2f} GB, {len(state)} tensors each."
    found = in_turns(ways, given.rounds)
    return Section("listing", "Listing steps", method, found, {"nbytes": held_bytes(state)})


def _copied(source: str, target: str) -> None:
    if source.endswith(".distcp"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def main() -> None:
    """Measure, and keep what was found."""
    given = asked(__doc__, ("listing",))
    quiet()
    with given.place() as folder:
        store(listing(given, folder), given.out, add=given.add)


if __name__ == "__main__":
    main()
