"""Memory that a piece of a program takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_BEFORE = """
import re, sys
from pathlib import Path

def memory_mib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
"""

_BETWEEN = """
Path("/proc/self/clear_refs").write_text("5")
held = memory_mib("VmRSS")
"""

_AFTER = """
print(memory_mib("VmHWM") - held)
"""


def extra_mib(prepared: str, measured: str, folder: Path, *arguments: str) -> float:
    """Return the memory in MiB that the code `measured` takes, after the code `prepared` has run.

    Both run in a new process, whose `sys.argv` has the folder and the arguments. The result is the
    peak of resident memory during `measured`, less the resident memory before it.
    """
    program = "".join((_BEFORE, prepared, _BETWEEN, measured, _AFTER))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(folder), *arguments],
        text=True,
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return float(ran.stdout)
