"""Runs scripts/checkpoint_conversion/convert_to_hf.py, by a shorter path."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).parent / "checkpoint_conversion/convert_to_hf.py"), run_name="__main__")
