"""Programs that end while a checkpoint is not durable yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from holdfast.catalog.seal import sync_files
from holdfast.hosts.background import BackgroundSync

def sync():
    while not threading._SHUTTING_DOWN:
        time.sleep(0.01)
    time.sleep(0.1)
    sync_files(Path("new"))

def delete():
    # As the store of a bucket does.
    with ThreadPoolExecutor(2) as pool:
        [*pool.map(Path.unlink, [Path("old/a"), Path("old/b")])]
    Path("old").rmdir()

background = BackgroundSync()
background.sync("new", sync)
background.delete("old", delete)
"""


def test_a_program_that_simply_ends_syncs_its_last_checkpoint_and_deletes_old_ones(
    tmp_path: Path,
) -> None:
    """G1, G7. Method: a sync that begins after the main thread has ended, when a pool of
    `concurrent.futures` takes no more work; then a deletion that has a pool of its own."""
    for file in ("new/weights", "old/a", "old/b"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("data")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert ran.stderr == ""
    assert ran.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
