"""Saves to a bucket that copy the files of earlier checkpoints: what they send, and every cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from bucket_cuts import MODES, Cut
from bucket_runs import quiet, store_in
from buckets import Dead, LateError, ModelBucket
from deduplicated import Run, flat, loaded
from extent import EVERYTHING
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.errors import HoldfastError
from holdfast.format.names import step_name
from holdfast.storage.bucket import UnansweredError

BASE, ADAPTER = 300_000, 1_000
"""Elements of a frozen tensor, and of one that changes."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def state(step: int) -> dict[str, Any]:
    """A state in which little changes from step to step."""
    return {
        "model": {
            "base": torch.arange(BASE, dtype=torch.float32),
            "adapter": torch.full((ADAPTER,), float(step)),
        },
        "lr": 0.1 / step,
    }


def trained(*steps: int, fail: Any = lambda *_: None) -> ModelBucket:
    """A bucket with checkpoints of a run."""
    bucket = ModelBucket()
    run = Run(Path(), store_in(bucket, fail))
    for step in steps:
        run.save(step, state(step))
    return bucket


def check(bucket: ModelBucket) -> list[int]:
    """Read every byte of all checkpoints. Returns their steps."""
    store = store_in(bucket)
    steps = Catalog(store).steps()
    for step in steps:
        assert loaded(store, step) == flat(state(step)), f"step {step}"
        assert verify(VerifyTarget(store, step_name(step))).good
    return steps


def data_bytes(bucket: ModelBucket, step: int, *, without: set[str]) -> int:
    """Bytes of the data files of a step, without those of some keys."""
    return sum(
        len(data)
        for key, data in bucket.contents().items()
        if key.startswith(f"{step_name(step)}/") and key.endswith(".distcp") and key not in without
    )


def test_a_save_sends_only_what_has_changed_and_has_files_of_its_own(tmp_path: Path) -> None:
    """G19. Method: from the third save on, the bytes that are sent are at most 1.05 times those
    that changed. Then the earlier steps are deleted, one by one: the later ones are whole, also for
    stock DCP."""
    copied: set[str] = set()

    def note(verb: str, key: str, when: str) -> None:
        if (verb, when) == ("copy", "after"):
            copied.add(key)

    bucket = trained(*range(1, 6), fail=note)
    for step in range(1, 6):
        sent = data_bytes(bucket, step, without=copied)
        if step > 2:
            assert sent <= 1.05 * 4 * ADAPTER + 4096, "what changed, a value and the table"
        else:
            assert sent > 4 * BASE
        assert data_bytes(bucket, step, without=set()) >= 4 * (BASE + ADAPTER)
    for step in range(1, 5):
        store = store_in(bucket)
        store.remove(Catalog(store).set_aside_for_deletion(step_name(step)))
        assert check(bucket) == [*range(step + 1, 6)]
    for key, data in bucket.contents().items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found = {"model": {"base": torch.zeros(BASE), "adapter": torch.zeros(ADAPTER)}}
    with pytest.warns(UserWarning, match="single process"):
        stock_load(found, storage_reader=FileSystemReader(tmp_path / "step-5"), no_dist=True)
    assert flat(found).items() <= flat(state(5)).items()


@pytest.mark.parametrize(("place", "first_good"), [(-9, 3), (BASE, 5)])
def test_a_damaged_file_is_not_copied(place: int, first_good: int) -> None:
    """G19. Method: a byte of the file that is to be copied is flipped: of the table of checksums,
    which is always compared, and of the data, which every second copy reads."""
    bucket = trained(1, 2)
    (key,) = [k for k in bucket.contents() if k.startswith("step-1/") and "_0.dist" in k]
    data = bytearray(bucket.contents()[key])
    data[place] ^= 1
    bucket.put(key, bytes(data))
    run = Run(Path(), store_in(bucket), check_every=1)
    run.resume(2)
    for step in (3, 4, 5):
        run.save(step, state(step))
    good = [
        step for step in (3, 4, 5) if verify(VerifyTarget(store_in(bucket), step_name(step))).good
    ]
    assert good == [step for step in (3, 4, 5) if step == 4 or step >= first_good]
    assert loaded(store_in(bucket), 5) == flat(state(5))


@pytest.mark.parametrize("kind", ["refused", "unanswered", "late"])
def test_a_file_that_is_not_copied_is_written_again(kind: str) -> None:
    """G19. Method: no copy is made; or each is, and its answer is lost; or the store makes it after
    the checkpoint is published."""

    def fail(verb: str, key: str, when: str) -> None:
        if verb != "copy" or key.endswith("/link"):
            return
        if kind == "late" and when == "before":
            raise LateError("no answer")
        if when == ("before" if kind == "refused" else "after"):
            raise UnansweredError("no answer")

    bucket = trained(1, 2)
    run = Run(Path(), store_in(bucket, fail))
    run.resume(2)
    run.save(3, state(3))
    assert check(bucket) == [1, 2, 3]
    bucket.arrive()
    assert check(bucket) == [1, 2, 3]
    later = Run(Path(), store_in(bucket))
    later.resume(3)
    later.save(4, state(4))
    assert check(bucket) == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_request_of_a_save_that_copies_may_be_cut() -> None:
    """G1, G2, G19. Method: each request of a save that copies a file (by default, each third) is
    cut in every way. Then a start cleans up: the earlier checkpoints are whole, and the new one is
    whole or absent; it is there if the save has returned. The run goes on."""
    for mode in MODES:
        at, cut = 0, Cut(0, mode)
        while at == 0 or cut.done:
            bucket, cut, returned = trained(1, 2), Cut(at, mode), False
            with suppress(Dead, HoldfastError):
                run = Run(Path(), store_in(bucket, cut))
                run.resume(2)
                run.save(3, state(3))
                returned = True
            bucket.ahead += timedelta(hours=1)
            put_in_order(store_in(bucket))
            found = check(bucket)
            assert found in ([1, 2], [1, 2, 3]), str(cut)
            assert found == [1, 2, 3] or not returned, str(cut)
            assert not [name for name in store_in(bucket).list() if name.startswith(".attempt")]
            run = Run(Path(), store_in(bucket))
            run.resume(found[-1])
            run.save(4, state(4))
            assert check(bucket) == [*found, 4]
            at += 1 if EVERYTHING else 3
        assert at > 10, "requests"
