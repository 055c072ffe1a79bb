#!/usr/bin/env python3
"""Writes the table of docs/architectures.md: the outcome for every architecture of transformers.

    python scripts/architectures.py [FILE]

Takes about half an hour of processor time. An architecture whose tensors or outputs differ ends it.
With FILE, each outcome is appended to it, and architectures that it has are not tried again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hub_classes

START = "<!-- table: written by scripts/architectures.py -->"
STOP = "<!-- end of table -->"


def main(file: Path | None) -> None:
    outcomes = {} if file is None else read(file)
    for model_type in hub_classes.architectures():
        if model_type in outcomes:
            continue
        with TemporaryDirectory() as folder:
            outcomes[model_type] = hub_classes.outcome_of(model_type, Path(folder))
        print(model_type, outcomes[model_type], sep="\t", flush=True)
        if file is not None:
            with file.open("a") as written:
                written.write(f"{model_type}\t{outcomes[model_type]}\n")
    write({model_type: outcomes[model_type] for model_type in hub_classes.architectures()})


def read(file: Path) -> dict[str, hub_classes.Outcome]:
    """Return the outcomes of an earlier, interrupted run."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = dict(line.split("\t") for line in lines)
    return {name: one for name, one in found.items() if one in hub_classes.OUTCOMES}  # type: ignore[misc]


def write(outcomes: Mapping[str, hub_classes.Outcome]) -> None:
    """Write the table into the page."""
    before, rest = hub_classes.PAGE.read_text().split(START)
    rows = []
    for outcome, text in hub_classes.OUTCOMES.items():
        types = [model_type for model_type, found in outcomes.items() if found == outcome]
        if types:
            rows.append(f"| {text} | {len(types)} | {' '.join(types)} |")
    version = f"transformers {transformers.__version__} has {len(outcomes)} architectures:"
    table = "\n".join(["| outcome | number | `model_type` |", "|---|---|---|", *rows])
    hub_classes.PAGE.write_text(
        f"{before}{START}\n\n{version}\n\n{table}\n\n{STOP}{rest.split(STOP)[1]}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
