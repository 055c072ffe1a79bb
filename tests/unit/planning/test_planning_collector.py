"""Garbage collection is paused while a save is planned, and resumes afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from holdfast.planning.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """Collection is enabled before each test, and restored after it."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


def test_collection_is_paused_in_nested_blocks_and_resumes_after_an_error() -> None:
    """G13. Method: a block within a block that raises."""
    with pytest.raises(ZeroDivisionError), gc_paused():
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


def test_collection_that_a_program_has_disabled_stays_disabled() -> None:
    """Method: the program collects only when it chooses to, as many trainers do."""
    gc.disable()
    with gc_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_collection_resumes_when_the_last_thread_leaves() -> None:
    """Method: the blocks of two threads overlap; the first to enter leaves first."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with gc_paused():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    with gc_paused():
        thread.start()
        inside.wait()
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
