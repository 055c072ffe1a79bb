"""The version of the package, also of code that is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import holdfast
from holdfast.release import UNKNOWN, installed_version

SAVE = """
import torch, holdfast
holdfast.save("one", {"model": torch.nn.Linear(2, 2)})
print(holdfast.__version__, holdfast.open("one").manifest.versions["holdfast"])
"""


def test_the_version_is_that_of_the_installed_package() -> None:
    assert holdfast.__version__ == installed_version() != UNKNOWN


def test_code_that_is_not_installed_can_save(tmp_path: Path) -> None:
    """Method: all other packages of this environment, and the source folder on the path."""
    site = tmp_path / "site"
    site.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "holdfast" not in package.name:
            (site / package.name).symlink_to(package)
    source = Path(holdfast.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (source, site)))}
    command = [sys.executable, "-S", "-c", SAVE]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.stderr, ran.stdout) == ("", f"{UNKNOWN} {UNKNOWN}\n")
