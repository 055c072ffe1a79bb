"""Benchmarks of saving, loading and planning: `python -m benchmarks.run [--quick] [PART ...]`.

Each part runs in its own process and stores its figures in `results/data`. Tables, plots and the
summary in `results/README.md` are made from all stored figures. `torch_checkpointing` is measured
if it is installed (`pip install holdfast[benchmarks]`). Compare figures only within one table: they
depend on the machine and its load.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import saving, sharded
from benchmarks.options import BenchmarkOptions, parse_options
from benchmarks.report import write_report

MODULES = {
    **dict.fromkeys(saving.PARTS, "benchmarks.saving"),
    "overlap": "benchmarks.overlap",
    **dict.fromkeys(sharded.PARTS, "benchmarks.sharded"),
    "listing": "benchmarks.listing",
    "planning": "benchmarks.planning",
    "planning_loads": "benchmarks.planning",
    "many_checkpoints": "benchmarks.many_checkpoints",
}


def command(part: str, options: BenchmarkOptions) -> list[str]:
    """Return the command that measures one part."""
    start = [sys.executable, "-m", MODULES[part]]
    out = ["--out", str(options.out / f"{part}.md")]
    if part in ("planning", "planning_loads"):
        sizes = ["8", "64"] if options.quick else ["8", "64", "512", "2048"]
        load = ["--load"] if part == "planning_loads" else []
        return [*start, *load, "--sizes", *sizes, *out]
    if part == "many_checkpoints":
        count = ["--count", "200"] if options.quick else []
        return [*start, *count, *out]
    return [*start, part, *options.arguments()]


def main() -> None:
    """Run the parts in turn, up to the first that fails, and write the report."""
    options = parse_options(__doc__, tuple(MODULES))
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        sys.stderr.write(f"{part}\n")
        subprocess.run(command(part, options), check=True)
    write_report(options.out)


if __name__ == "__main__":
    main()
