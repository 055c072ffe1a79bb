"""Locks on files: what no other test of locks needs processes for."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import Any

import pytest

from holdfast.storage.locks import Lock


def test_a_lock_whose_constructor_failed_is_deleted_without_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: the constructor gets a closed descriptor, so that it fails where an interrupt could
    come. Python reports errors of `__del__` by `sys.unraisablehook`."""
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    with suppress(OSError):
        Lock(descriptor)
    gc.collect()
    assert not ignored
