"""Converts a checkpoint to a Hugging Face folder, by `holdfast convert --to hf`.

python ./scripts/checkpoint_conversion/convert_to_hf.py INPUT OUTPUT \
    --hf_assets_path ./assets/hf/Llama3.1-8B --model_name llama3 --model_flavor 8B
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
parser.add_argument("--hf_assets_path", help="folder with config.json and tokenizer")
parser.add_argument("--model_name", help="checked against config.json, or in its place")
parser.add_argument("--model_flavor", help="checked against config.json, or in its place")
parser.add_argument("--export_dtype", choices=("float32", "bfloat16", "float16"))
parser.add_argument("--skip", action="append", default=[], help="pattern of tensors to leave out")
given = parser.parse_args()
command = ["convert", given.input_dir, given.output_dir, "--to", "hf"]
flags = {
    "hf_assets_path": "--hf-assets",
    "model_name": "--model-name",
    "model_flavor": "--model-flavor",
    "export_dtype": "--dtype",
}
for key, flag in flags.items():
    if getattr(given, key) is not None:
        command += [flag, getattr(given, key)]
for pattern in given.skip:
    command += ["--skip", pattern]
sys.exit(main(command))
