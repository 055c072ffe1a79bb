"""What a piece of a program takes of memory beside what it held before."""

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
    """The peak of resident memory of a process of its own while `measured` runs, beyond what it had
    once `prepared` had run. `sys.argv` has the folder and the arguments."""
    program = "".join((_BEFORE, prepared, _BETWEEN, measured, _AFTER))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(folder), *arguments],
        text=True,
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return float(ran.stdout)
