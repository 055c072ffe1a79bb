#!/usr/bin/env python3
"""Writes the table of docs/architectures.md: the outcome for every architecture of transformers.

    python scripts/architectures.py

Takes about half an hour of processor time. An architecture whose tensors or outputs differ ends it.
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


def main() -> None:
    outcomes: dict[str, hub_classes.Outcome] = {}
    for model_type in hub_classes.architectures():
        model = hub_classes.build(model_type)
        with TemporaryDirectory() as folder:
            outcomes[model_type] = (
                "none" if model is None else hub_classes.round_trip(model, Path(folder))
            )
        print(model_type, outcomes[model_type], flush=True)
    write(outcomes)


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
    main()
