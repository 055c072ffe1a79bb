"""Converts a Hugging Face folder, or a repository on the hub, by `holdfast convert --to dcp`.

python ./scripts/checkpoint_conversion/convert_from_hf.py INPUT OUTPUT --model_name llama3 \
    --model_flavor 8B
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from holdfast.cli.main import main
except ImportError:
    python = Path(__file__).resolve().parents[2] / ".venv/bin/python"
    if not python.exists() or Path(sys.executable) == python:
        sys.exit("holdfast is not installed: ./run_train.sh --help sets it up")
    os.execv(python, [str(python), *sys.argv])

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("input_dir")
parser.add_argument("output_dir")
parser.add_argument("--model_name", help="checked against config.json")
parser.add_argument("--model_flavor", help="checked against config.json")
parser.add_argument("--skip", action="append", default=[], help="pattern of tensors to leave out")
given = parser.parse_args()
command = ["convert", given.input_dir, given.output_dir, "--to", "dcp"]
for key in ("model_name", "model_flavor"):
    if getattr(given, key) is not None:
        command += [f"--{key.replace('_', '-')}", getattr(given, key)]
for pattern in given.skip:
    command += ["--skip", pattern]
sys.exit(main(command))
