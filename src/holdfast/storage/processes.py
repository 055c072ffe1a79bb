"""Find out whether a process of this machine still runs, even if another one has its PID now."""

from __future__ import annotations

import os
from pathlib import Path


def this_process() -> str:
    """Return a name of this process: boot ID of the machine, PID namespace, PID and start time.
    Empty where there is no `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        return f"{boot} {namespace} {os.getpid()} {_start_of(os.getpid())}"
    except OSError:
        return ""


def runs(process: str) -> bool | None:
    """Return whether a process still runs. `process`: what `this_process` returned in it. Return
    None for a process of another machine or PID namespace, which cannot be seen from here."""
    ours, theirs = this_process().split(), process.split()
    if not ours or theirs[:2] != ours[:2] or len(theirs) != len(ours):
        return None
    try:
        return _start_of(int(theirs[2])) == theirs[3]
    except (OSError, ValueError):
        return False


def _start_of(pid: int) -> str:
    """Return the start time of a process, in clock ticks since the machine was booted."""
    # Skip the name of the program, which is in brackets and may have spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
