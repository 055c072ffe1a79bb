"""Command-line options that the benchmarks share."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class BenchmarkOptions:
    """Parts of a benchmark to run, their size and their number of rounds."""

    parts: tuple[str, ...]
    nbytes: int
    """Bytes of training state."""

    rounds: int
    add: bool
    """Whether to add the rounds to the stored ones."""

    folder: Path
    """Folder on the disk to measure."""

    out: Path
    """Folder of the results."""

    quick: bool

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """Context with an empty folder on the disk to measure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)

    def arguments(self) -> list[str]:
        """Return the command-line arguments that give these options, without the parts."""
        size = ["--gb", str(self.nbytes / 1e9), "--rounds", str(self.rounds)]
        folders = ["--folder", str(self.folder), "--out", str(self.out)]
        return [*size, *folders, *(["--add"] if self.add else [])]


def parse_options(
    description: str | None, parts: Sequence[str], *, gb: float = 2.2
) -> BenchmarkOptions:
    """Parse the command line; all `parts` run if it names none. `gb`: size by default."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--gb", type=float, default=gb, help="size of the training state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="0.3 GB and 2 rounds")
    parser.add_argument("--add", action="store_true", help="add to the stored rounds")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="on the disk measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parsed = parser.parse_args()
    if unknown := set(parsed.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if parsed.quick:
        parsed.gb, parsed.rounds = min(parsed.gb, 0.3), min(parsed.rounds, 2)
    return BenchmarkOptions(
        parts=tuple(parsed.parts) or tuple(parts),
        nbytes=int(parsed.gb * 1e9),
        rounds=parsed.rounds,
        add=parsed.add,
        folder=parsed.folder.resolve(),
        out=parsed.out.resolve(),
        quick=parsed.quick,
    )


def silence_warnings() -> None:
    """Turn off warnings and logs, also in child processes, so that only results are printed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["PYTHONWARNINGS"] = "ignore"
