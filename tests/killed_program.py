"""Runs a program that is killed in a save: `killed_program.py NAME TIMES RANK PROGRAM`.

The process of that rank dies by SIGKILL when the `TIMES`-th file of the name `NAME` is opened.
"""

from __future__ import annotations

import os
import runpy
import sys

from host_runs import kill_at

if __name__ == "__main__":
    name, times, rank, program = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        kill_at(name, times=int(times))
    sys.argv = [program]
    runpy.run_path(program, run_name="__main__")
