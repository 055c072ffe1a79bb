"""Processes that save, load, delete and clean up in a bucket at once: they send their requests in
every order up to a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from bucket_runs import (
    NAME,
    NEW,
    OLD,
    clean_up,
    delete,
    held_in,
    left_by_a_killed_save,
    load,
    quiet,
    save,
    store_in,
)
from buckets import ModelBucket
from extent import EVERYTHING
from holdfast.catalog.cleanup import put_in_order
from holdfast.errors import ExistsError, NotFoundError
from holdfast.saving.save import Saved
from holdfast.storage.objects import ObjectStore
from interleavings import Actor, Ran, Wait, orders

MANY = pytest.mark.slow, pytest.mark.timeout(3000)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def view(bucket: ModelBucket, wait: Wait) -> ObjectStore:
    """A store whose requests wait for their turn."""

    def begin(verb: str, key: str, when: str) -> None:
        if when == "before":
            wait(verb, key)

    return store_in(bucket, begin)


def ran_in(
    one: Actor, other: Actor, switches: int, before: Callable[[ObjectStore], object]
) -> Iterator[Ran[ModelBucket]]:
    """Run two actors in every order of their requests."""
    return all_ran_in([one, other], switches, before)


def all_ran_in(
    actors: Sequence[Actor],
    switches: int,
    before: Callable[[ObjectStore], object],
    *,
    stride: int = 1,
) -> Iterator[Ran[ModelBucket]]:
    """Run actors in every order of their requests: see `orders`."""
    first = ModelBucket()
    before(store_in(first))
    contents = first.contents()
    return orders(lambda: ModelBucket(contents), view, actors, switches_max=switches, stride=stride)


def check(ran: Ran[Any], condition: object) -> None:
    """Assert, with the order in the message."""
    assert condition, str(ran)


SWITCHES = pytest.mark.parametrize("switches", [1, pytest.param(2, marks=MANY)])


@SWITCHES
def test_of_two_saves_to_one_name_one_wins(switches: int) -> None:
    """G16. Method: two saves to a free name; every order."""
    for ran in ran_in(partial(save, OLD), partial(save, NEW), switches, lambda _: None):
        kinds = sorted(type(outcome).__name__ for outcome in ran.outcomes)
        check(ran, kinds == ["ExistsError", "Saved"])
        check(ran, isinstance(ran.outcomes[(held_in(ran.store) or 0) - 1], Saved))


@SWITCHES
def test_of_two_saves_that_replace_one_checkpoint_a_winner_is_found(switches: int) -> None:
    """G16. Method: two saves that overwrite; every order. The result is a winner's."""
    one, other = (partial(save, value, overwrite=True) for value in (OLD, NEW))
    for ran in ran_in(one, other, switches, partial(save, 9)):
        won = [n for n, outcome in enumerate(ran.outcomes, 1) if isinstance(outcome, Saved)]
        lost = [outcome for outcome in ran.outcomes if not isinstance(outcome, Saved)]
        check(ran, won)
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        check(ran, held_in(ran.store) in won)


@SWITCHES
def test_a_load_beside_a_replacing_save_gives_one_checkpoint(switches: int) -> None:
    """G2, G16. Method: a load during a save that replaces the checkpoint and cleans up; every
    order."""
    for ran in ran_in(partial(save, NEW, overwrite=True), load, switches, partial(save, OLD)):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, ran.outcomes[1] in (OLD, NEW))
        check(ran, held_in(ran.store) == NEW)


@SWITCHES
def test_a_cleanup_spares_a_save_in_progress(switches: int) -> None:
    """G16. Method: a save, new or replacing, during the cleanup of a start; every order."""
    for ran in ran_in(
        partial(save, NEW, overwrite=True), clean_up, switches, left_by_a_killed_save
    ):
        check(ran, isinstance(ran.outcomes[0], Saved))
        check(ran, ran.outcomes[1] == [])
        check(ran, held_in(ran.store) == NEW)


@SWITCHES
def test_a_deletion_beside_a_load_or_a_save(switches: int) -> None:
    """G5, G16. Method: a deletion during a load, then during a replacing save; every order. The
    load gives the whole checkpoint, or finds none."""
    for ran in ran_in(delete, load, switches, partial(save, OLD)):
        check(ran, ran.outcomes[0] is None)
        check(ran, ran.outcomes[1] == OLD or isinstance(ran.outcomes[1], NotFoundError))
    for ran in ran_in(delete, partial(save, NEW, overwrite=True), switches, partial(save, OLD)):
        saved = isinstance(ran.outcomes[1], Saved)
        check(ran, saved or isinstance(ran.outcomes[1], ExistsError))
        value = held_in(ran.store)
        check(ran, value in ((NEW, None) if saved else (OLD, None)))


@pytest.mark.parametrize(
    ("switches", "stride"), [(1, 1 if EVERYTHING else 11), pytest.param(2, 17, marks=MANY)]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_two_saves_a_load_and_a_cleanup_at_once(
    switches: int, stride: int, overwrite: bool
) -> None:
    """G1, G2, G16. Method: two saves to a name, free or of a checkpoint that both replace, a load
    and the cleanup of a start, beside what a killed save has left. Any of them begins, and there is
    one switch to any other, after each eleventh request; `--all` has one switch after each request,
    and two after each seventeenth. A save wins, the load gives one checkpoint or finds none, the
    cleanup fails nowhere, and a later start leaves the winner's checkpoint alone."""
    saves = [partial(save, value, overwrite=overwrite) for value in (OLD, NEW)]

    def before(store: ObjectStore) -> None:
        for file in ("__0_0.distcp", "manifest.json"):
            store._bucket.put(f"{NAME}/0badcafe/{file}", b"half")
        if overwrite:
            save(9, store)

    for ran in all_ran_in([*saves, load, clean_up], switches, before, stride=stride):
        won = [n for n, outcome in enumerate(ran.outcomes[:2], 1) if isinstance(outcome, Saved)]
        lost = [outcome for outcome in ran.outcomes[:2] if not isinstance(outcome, Saved)]
        check(ran, won if overwrite else len(won) == 1)
        check(ran, all(isinstance(outcome, ExistsError) for outcome in lost))
        none = not overwrite and isinstance(ran.outcomes[2], NotFoundError)
        check(ran, none or ran.outcomes[2] in (OLD, NEW, *[9] * overwrite))
        check(ran, ran.outcomes[3] == [])
        value = held_in(ran.store)
        check(ran, value in won)
        ran.store.ahead += timedelta(hours=1)
        put_in_order(store_in(ran.store))
        check(ran, held_in(ran.store) == value)
        left = {key.partition("/")[2].rpartition("/")[0] for key in ran.store.contents()}
        check(ran, len(left - {""}) == 1)
