"""The benchmarks of saving, loading and planning: `python -m benchmarks.run [--quick] [PART ...]`.

Each part runs in a process of its own and keeps its figures in `results/data`; tables, plots and
the summary in `results/README.md` are made of all that is kept. `torch_checkpointing` takes part
where it is installed (`pip install holdfast[benchmarks]`). Figures are for comparing systems within
one table: between machines, and on a busy one, they mean nothing.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import saving, sharded
from benchmarks.asked import Asked, asked
from benchmarks.report import write_report

MODULES = {
    **dict.fromkeys(saving.PARTS, "benchmarks.saving"),
    "overlap": "benchmarks.overlap",
    **dict.fromkeys(sharded.PARTS, "benchmarks.sharded"),
    "listing": "benchmarks.listing",
    "planning": "benchmarks.planning",
}


def command(part: str, given: Asked) -> list[str]:
    """What measures one part."""
    start = [sys.executable, "-m", MODULES[part]]
    if part == "planning":
        sizes = ["8", "64"] if given.quick else ["8", "64", "512", "2048"]
        return [*start, "--sizes", *sizes, "--out", str(given.out / "planning.md")]
    return [*start, part, *given.arguments()]


def main() -> None:
    """Run one after the other; the first that fails ends it."""
    given = asked(__doc__, tuple(MODULES))
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        sys.stderr.write(f"{part}\n")
        subprocess.run(command(part, given), check=True)
    write_report(given.out)


if __name__ == "__main__":
    main()
