"""Tell whether a process of this machine still runs, also after its number went to another one."""

from __future__ import annotations

import os
from pathlib import Path


def this_process() -> str:
    """Name this process: machine since its start, PID namespace, PID, time of its start. Empty
    where there is no `/proc`."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        return f"{boot} {namespace} {os.getpid()} {_start_of(os.getpid())}"
    except OSError:
        return ""


def runs(process: str) -> bool | None:
    """Whether a process, as `this_process` names it, runs. None if it is of another machine or PID
    namespace, which cannot be told from here."""
    ours, theirs = this_process().split(), process.split()
    if not ours or theirs[:2] != ours[:2] or len(theirs) != len(ours):
        return None
    try:
        return _start_of(int(theirs[2])) == theirs[3]
    except (OSError, ValueError):
        return False


def _start_of(pid: int) -> str:
    """Time of the start of a process, in ticks since the start of the machine."""
    # The name of the program, in brackets, may have spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
