"""Files that are written with `O_DIRECT`, for the tests."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from holdfast.storage import direct
from holdfast.storage.direct import _copied, open_direct


def skip_without_direct(folder: Path) -> None:
    """Skip the test if the file system of `folder` does not support `O_DIRECT`."""
    probe = folder / "probe"
    probe.touch()
    descriptor = open_direct(str(probe))
    if descriptor is None:
        pytest.skip("this file system knows no O_DIRECT")
    os.close(descriptor)
    probe.unlink()


def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the bytes of each copy that a direct write makes from now on."""
    nbytes: list[int] = []

    def copied(parts: Sequence[memoryview], window: mmap.mmap) -> memoryview:
        copy = _copied(parts, window)
        nbytes.append(len(copy))
        return copy

    monkeypatch.setattr(direct, "_copied", copied)
    return nbytes
