"""All benchmarks that need nothing but this project: `python -m benchmarks.run [--quick]`.

Each runs in a process of its own and leaves its table in `benchmarks/results/`. Figures are for
comparing systems within one table: between machines, and on a busy one, they mean nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def commands(quick: bool) -> dict[str, list[str]]:
    """Name of the result, and the module with its arguments."""
    size, rounds = (["--gb", "0.3"], ["--rounds", "2"]) if quick else ([], [])
    ranks = ["--sizes", "8", "64"] if quick else ["--sizes", "8", "64", "512", "2048"]
    return {
        "saving": ["benchmarks.saving", *size, *rounds],
        "small": ["benchmarks.saving", "--small", *rounds],
        "overlap": ["benchmarks.overlap", *size, *rounds],
        "planning": ["benchmarks.planning", *ranks],
    }


def main() -> None:
    """Run one after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small states and few rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the tables")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, command in commands(asked.quick).items():
        out = ["--out", str(asked.out / f"{name}.md")]
        subprocess.run([sys.executable, "-m", *command, *out], check=True)


if __name__ == "__main__":
    main()
