"""What a benchmark was asked for, on the command line."""

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
class Asked:
    """Which parts of a benchmark, how large and how often."""

    parts: tuple[str, ...]
    nbytes: int
    """Of training state."""

    rounds: int
    add: bool
    """Whether rounds are put beside those that are there."""

    folder: Path
    """On the disk that is measured."""

    out: Path
    quick: bool

    @contextmanager
    def place(self) -> Iterator[Path]:
        """An empty folder, gone afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)

    def arguments(self) -> list[str]:
        """The same, for a process that is asked for it."""
        size = ["--gb", str(self.nbytes / 1e9), "--rounds", str(self.rounds)]
        places = ["--folder", str(self.folder), "--out", str(self.out)]
        return [*size, *places, *(["--add"] if self.add else [])]


def asked(about: str | None, parts: Sequence[str]) -> Asked:
    """What the command line says. All parts where it names none; `--quick` is small and short."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}")
    parser.add_argument("--gb", type=float, default=2.2, help="of training state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="0.3 GB and 2 rounds")
    parser.add_argument("--add", action="store_true", help="beside the rounds that are there")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="on the disk measured")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    found = parser.parse_args()
    if unknown := set(found.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if found.quick:
        found.gb, found.rounds = min(found.gb, 0.3), min(found.rounds, 2)
    return Asked(
        *(tuple(found.parts) or tuple(parts), int(found.gb * 1e9), found.rounds),
        *(found.add, found.folder.resolve(), found.out.resolve(), found.quick),
    )


def quiet() -> None:
    """No warnings or log of any system between the figures."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["PYTHONWARNINGS"] = "ignore"
