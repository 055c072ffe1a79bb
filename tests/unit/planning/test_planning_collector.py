"""Python's garbage collector rests while a save is planned, and goes on afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from holdfast.planning.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    """On before each test, and as it was afterwards."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


def test_it_rests_inside_also_of_another_and_goes_on_after_an_error() -> None:
    """G13."""
    with pytest.raises(ZeroDivisionError), gc_paused():
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


def test_where_a_program_has_turned_it_off_it_stays_off() -> None:
    """Method: as trainers do that collect at steps of their own choice."""
    gc.disable()
    with gc_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_it_goes_on_with_the_last_thread_that_leaves() -> None:
    """Method: two threads whose stays overlap, the first in leaves first."""
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
