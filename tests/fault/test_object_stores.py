"""Saves, loads, deletions and clean-ups in a bucket: every request is cut, answered wrongly or
arrives late.

The bucket is in memory. `test_storage_objects` runs one suite on it and on a real server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from bucket_cuts import MODES, Cut, Mode
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
    state_of,
    stock_reads,
    store_in,
)
from buckets import CHANGES, Dead, LateError, ModelBucket
from checkpoints import save_leaves
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.comm import Solo
from holdfast.errors import ExistsError, HoldfastError, NotFoundError
from holdfast.format.names import LOCK, METADATA, step_name
from holdfast.format.pointer import id_in
from holdfast.state.objects import StateTree
from holdfast.storage import streams
from holdfast.storage.bucket import UnansweredError
from holdfast.storage.objects import ObjectStore


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@dataclass(frozen=True)
class Case:
    """An operation, and what a start may find after it was cut."""

    act: Callable[[ObjectStore], object]
    before: Callable[[ObjectStore], object]
    found: tuple[int | None, ...]
    """Values that a load may give once the operation was cut."""

    done: int | None
    """Value that a load gives once the operation has returned."""


CASES = {
    "a save": Case(partial(save, NEW), lambda _: None, (None, NEW), NEW),
    "a replacing save": Case(
        partial(save, NEW, overwrite=True), partial(save, OLD), (OLD, NEW), NEW
    ),
    "a deletion": Case(delete, partial(save, OLD), (OLD, None), None),
    "a cleanup": Case(clean_up, left_by_a_killed_save, (OLD,), OLD),
}


def num_requests(case: Case, only: tuple[str, ...] = CHANGES) -> int:
    """Requests of an operation that nothing disturbs."""
    bucket = ModelBucket()
    case.before(store_in(bucket))
    counting = Cut(1 << 30, "after", only)
    case.act(store_in(bucket, counting))
    return counting.count


def check_start(bucket: ModelBucket, case: Case, cut: Cut, *, returned: bool, folder: Path) -> None:
    """Do what the next start does, once the leases of the dead process have lapsed."""
    bucket.ahead += timedelta(hours=1)
    bucket.lag = 0
    value = held_in(bucket)
    assert value in ((case.done,) if returned else case.found), str(cut)
    store = store_in(bucket)
    put_in_order(store)
    assert held_in(bucket) == value, str(cut)
    names = [name for name in store.list() if not name.startswith(".held-")]
    assert names == ([] if value is None else [f"{NAME}/"]), str(cut)
    left = {key.rpartition("/")[0] for key in bucket.contents() if not key.startswith(".held-")}
    if value is None:
        assert left == set(), str(cut)
        return
    pointed = id_in(bucket.contents()[f"{NAME}/manifest.json"])
    assert left == {NAME, f"{NAME}/{pointed}"}, str(cut)
    if f"{NAME}/{METADATA}" in bucket.contents():
        assert stock_reads(bucket, folder) == value, str(cut)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_every_request_of_an_operation_may_be_cut(name: str, mode: Mode, tmp_path: Path) -> None:
    """G1, G2. Method: each changing request of a save, a replacing save, a deletion and a cleanup:
    the process dies before or after it, or the request fails, or its answer is lost. Then the next
    start finds the old or the new checkpoint, whole, and cleans up everything else. An operation
    that returned has taken effect."""
    case = CASES[name]
    for at in range(num_requests(case)):
        bucket, cut = ModelBucket(), Cut(at, mode)
        case.before(store_in(bucket))
        returned = False
        with suppress(Dead, HoldfastError):
            # A cleanup reports what it could not do.
            returned = case.act(store_in(bucket, cut)) in (None, []) or name != "a cleanup"
        assert cut.done
        check_start(bucket, case, cut, returned=returned, folder=tmp_path / "copy")


@pytest.mark.parametrize("name", CASES)
def test_every_read_of_an_operation_may_fail(name: str, tmp_path: Path) -> None:
    """G7, G11. Method: each listing, head and get fails once. The operation raises, or has taken
    effect; nothing is lost."""
    case, reads = CASES[name], ("list", "head", "get", "get_range")
    for at in range(num_requests(case, reads)):
        bucket, cut = ModelBucket(), Cut(at, "failed", reads)
        case.before(store_in(bucket))
        returned = False
        with suppress(HoldfastError):
            returned = case.act(store_in(bucket, cut)) in (None, []) or name != "a cleanup"
        check_start(bucket, case, cut, returned=returned, folder=tmp_path / "copy")


def test_a_save_whose_last_answer_is_lost_has_succeeded() -> None:
    """G1. Method: the store publishes the checkpoint, and the answer to that request is lost."""

    def lose(verb: str, key: str, when: str) -> None:
        if (key, when) == (f"{NAME}/manifest.json", "after") and verb == "put_new" and not lost:
            lost.append(key)
            raise UnansweredError("no answer")

    bucket, lost = ModelBucket(), list[str]()
    save(NEW, store_in(bucket, lose))
    assert lost
    assert held_in(bucket) == NEW


@pytest.mark.parametrize("lag", [1, 3, 10, 100])
def test_listings_that_lag_harm_nothing(lag: int) -> None:
    """G2. Method: listings without the last changes, while a checkpoint is saved, replaced and
    loaded, and a start cleans up. A load gives one of them, or finds none in time. Once listings
    show everything, the published checkpoint is there and loads."""

    def load_if_listed() -> int | None:
        with suppress(HoldfastError):
            return load(store_in(bucket))
        return None

    bucket = ModelBucket(lag=lag)
    save(OLD, store_in(bucket))
    clean_up(store_in(bucket))
    assert load_if_listed() in (OLD, None)
    saved = False
    with suppress(HoldfastError):
        save(NEW, store_in(bucket), overwrite=True)
        saved = True
    bucket.ahead += timedelta(hours=1)
    clean_up(store_in(bucket))
    assert load_if_listed() in (NEW if saved else OLD, None)
    bucket.lag = 0
    clean_up(store_in(bucket))
    assert held_in(bucket) == (NEW if saved else OLD)


def test_an_upload_that_is_cut_leaves_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """G1. Method: files sent in parts of 100 bytes; each request of the uploads is cut in every
    way."""
    monkeypatch.setattr(streams, "PART_BYTES", 100)
    case = Case(partial(save, NEW), lambda _: None, (None, NEW), NEW)
    uploads = ("upload", "part", "complete")
    for mode in MODES:
        for at in range(num_requests(case, uploads)):
            bucket, cut, returned = ModelBucket(), Cut(at, mode, uploads), False
            with suppress(Dead, HoldfastError):
                save(NEW, store_in(bucket, cut))
                returned = True
            bucket.ahead += timedelta(hours=1)
            assert held_in(bucket) == (NEW if returned else None), str(cut)
            put_in_order(store_in(bucket))
            assert held_in(bucket) == (NEW if returned else None), str(cut)


@dataclass
class LateFrom:
    """Sends the put of this number, and all later ones to its key, late. Then the process gives up,
    or dies."""

    at: int
    dies: bool
    count: int = 0
    request: tuple[str, str] = ("", "")

    def __call__(self, verb: str, key: str, when: str) -> None:
        if self.dies and self.request[0]:
            raise Dead(str(self.request))
        if when == "before" and verb in PUTS:
            self.count += 1
            if self.count > self.at and not self.request[0]:
                self.request = verb, key
            if self.request[1] == key:
                raise LateError(f"no answer: {verb} {key}")


PUTS = ("put_new", "put_over", "put")

THEN: dict[str, Callable[[ObjectStore], object]] = {
    "nothing": lambda _: None,
    "a start": put_in_order,
    "a save": partial(save, 3, overwrite=True),
    "a deletion": delete,
}
"""Operation of another process before the late requests arrive, by name."""


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_put_that_arrives_late_harms_nothing(
    name: str, dies: bool, then: str, tmp_path: Path
) -> None:
    """G1, G2. Method: each put of a save, a replacing save, a deletion and a cleanup is on its way
    while its client gives up, and deletes the attempt, or dies. It arrives at once, or after a
    start has cleaned up, or after another save or a deletion of that name. What is there
    afterwards is whole, and is what was there before it arrived, or the checkpoint of that put; a
    start cleans up everything else."""
    case = CASES[name]
    for at in range(num_requests(case, PUTS)):
        bucket, late, returned = ModelBucket(), LateFrom(at, dies), False
        case.before(store_in(bucket))
        with suppress(Dead, HoldfastError):
            returned = case.act(store_in(bucket, late)) in (None, []) or name != "a cleanup"
        assert late.request[0]
        if dies:
            bucket.ahead += timedelta(hours=1)
        acted = then != "nothing"
        try:
            THEN[then](store_in(bucket))
        except NotFoundError:
            acted = False  # There is nothing to delete, so the late put may still take effect.
        value = held_in(bucket)
        bucket.arrive()
        bucket.ahead += timedelta(hours=1)
        found = held_in(bucket)
        message = f"put {at}: {late.request}"
        assert found == value or (not acted and found in case.found), message
        assert found in ({3} if then == "a save" else {*case.found, case.done, None}), message
        assert not returned or acted or found == case.done, message
        put_in_order(store_in(bucket))
        assert held_in(bucket) == found, message
        names = [key for key in store_in(bucket).list() if not key.startswith(".held-")]
        assert names == ([] if found is None else [f"{NAME}/"]), message
        if f"{NAME}/{METADATA}" in bucket.contents():
            assert stock_reads(bucket, tmp_path / "copy") == found, message


def test_a_holder_whose_lease_has_lapsed_publishes_nothing() -> None:
    """G1, G16. Method: a save stops before it publishes; meanwhile its lease lapses, and a cleanup
    deletes its attempt. The save raises, and nothing is published."""

    def stop(verb: str, key: str, when: str) -> None:
        if (verb, key, when) == ("put_new", f"{NAME}/manifest.json", "before"):
            raise AssertionError("it must not be sent")
        if key.endswith("/manifest.json") and when == "after" and verb == "put_new":
            bucket.ahead += timedelta(hours=1)
            clean_up(store_in(bucket))
            lease.append(key)
            for held in store._leases._held.values():
                held._sent -= 3600

    bucket, lease = ModelBucket(), list[str]()
    store = store_in(bucket, stop)
    with pytest.raises(HoldfastError, match=r"held by another|was deleted"):
        save(NEW, store)
    assert lease
    assert held_in(bucket) is None


def test_a_lock_is_taken_over_once_its_holder_is_dead() -> None:
    """G16. Method: a lock whose process dies; refused before its lease lapses, free afterwards."""
    bucket = ModelBucket()
    dead = store_in(bucket)
    with dead.lock(LOCK, "run 7"), suppress(HoldfastError):
        with pytest.raises(ExistsError, match="run 7"), store_in(bucket).lock(LOCK, "run 8"):
            pass
        bucket.ahead += timedelta(hours=1)
        with store_in(bucket).lock(LOCK, "run 9") as check_lock:
            check_lock()
            assert store_in(bucket).holder(LOCK) == "run 9"
            for held in dead._leases._held.values():
                held._sent -= 3600
            with pytest.raises(ExistsError, match="run 9"):
                dead._leases.held(LOCK).renew()  # type: ignore[union-attr]


def test_steps_of_a_run_are_listed_newest_last() -> None:
    """Method: three steps, one of them saved twice, and an attempt in progress."""
    bucket = ModelBucket()
    store = store_in(bucket)
    for step in (2, 10, 9):
        leaves = StateTree(state_of(step)).flatten()
        save_leaves(Catalog(store), step_name(step), leaves, Solo(), step=step, kind="full")
    with store.hold(".attempt-step-11-00000001"):
        store._bucket.put("step-11/00000001/__0_0.distcp", b"half")
        assert Catalog(store_in(bucket)).steps() == [2, 9, 10]
        assert ".attempt-step-11-00000001/" in store_in(bucket).list()
