"""Checkpoints on a server of S3 that answers with errors, too late, or not at all.

The requests go through obstore and a socket, so that its retries are tested too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from typing import Any

import pytest
import torch

import holdfast
from bucket_runs import quiet
from extent import EVERYTHING, every
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import put_in_order
from holdfast.cli.main import main as cli
from holdfast.errors import HoldfastError
from holdfast.format.names import step_name
from holdfast.storage import cloud, streams
from holdfast.storage.cloud import CloudBucket
from holdfast.storage.objects import ObjectStore
from http_faults import MODES, Fault, Mode
from s3_server import new_s3_url, s3_server

pytestmark = pytest.mark.timeout(3600 if EVERYTHING else 600)

TIME_OUT_S = 3.0

LATE_S = 3.5
"""Time after which a late answer comes: longer than any time-out."""

ELEMENTS = 3 << 20
"""Elements of the tensor, whose file is sent in three parts."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a new bucket, whose clients soon give a request up."""
    for name in ("REQUEST_S", "_DATA_S"):
        monkeypatch.setattr(cloud, name, TIME_OUT_S)
    monkeypatch.setattr(cloud, "_PATIENCE_S", 10.0)
    monkeypatch.setattr(streams, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(cloud, "PART_BYTES", 5 << 20)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Of the server's cut connections.
        yield new_s3_url(monkeypatch)


def state(value: int) -> dict[str, Any]:
    return {"w": torch.full((ELEMENTS,), float(value)), "value": value}


def held(url: str) -> int | None:
    """Value in a checkpoint, all of whose bytes are read; None if there is none."""
    try:
        found = state(0)
        holdfast.load(url, found)
    except holdfast.NotFoundError:
        return None
    value: int = found["value"]
    assert torch.equal(found["w"], torch.full((ELEMENTS,), float(value))), "a mix"
    return value


def managed(url: str, value: int) -> CheckpointManager:
    module = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(module.weight, float(value))
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=0)
    return CheckpointManager(url, model=module, config=config)


def train(url: str) -> None:
    """Save three steps, and keep all."""
    with managed(url, 1) as manager:
        for step in (1, 2, 3):
            manager.save(step)


def resume(url: str) -> None:
    with managed(url, 0) as manager:
        assert manager.load().step == 3


def prune(url: str) -> None:
    if cli(["prune", url, "--keep-latest-k", "2"]):
        raise HoldfastError("prune has failed")


def steps(url: str) -> list[int]:
    """Steps of the checkpoints, all of whose bytes are read."""
    found = Catalog(ObjectStore(CloudBucket(url))).steps()
    for step in found:
        checkpoint = holdfast.open(f"{url}/{step_name(step)}")
        assert float(checkpoint.read("weight")[0, 0]) == 1.0
    return found


def save(value: int, url: str, *, overwrite: bool = False) -> None:
    holdfast.save(f"{url}/step-5", state(value), overwrite=overwrite)


def load(url: str) -> None:
    assert held(f"{url}/step-5") == 1


@dataclass(frozen=True)
class Case:
    """An operation on a folder, and what may be there once it has failed."""

    before: Callable[[str], object]
    act: Callable[[str], object]
    found: Callable[[str], object]
    """Reads what is there."""

    done: object
    """Result of `found` after a success."""

    failed: tuple[object, ...]
    """Results that `found` may have after an error."""


def held_at_5(url: str) -> int | None:
    return held(f"{url}/step-5")


CASES = {
    "save": Case(lambda _: None, partial(save, 2), held_at_5, 2, (None, 2)),
    "replace": Case(partial(save, 1), partial(save, 2, overwrite=True), held_at_5, 2, (1, 2)),
    "load": Case(partial(save, 1), load, held_at_5, 1, (1,)),
    "resume": Case(train, resume, steps, [1, 2, 3], ([1, 2, 3],)),
    "prune": Case(train, prune, steps, [2, 3], ([1, 2, 3], [2, 3])),
}


def copy(source: str, target: str) -> None:
    """Copy all objects of a folder."""
    one = CloudBucket(source)
    for found in one.list_all(""):
        data, _ = one.get(found.key, found.nbytes)
        CloudBucket(target).put(found.key, data)


def run(case: Case, url: str, fault: Fault) -> bool:
    """Act once, with a fault. Returns whether it has succeeded. Fails if anything is lost."""
    succeeded = False
    with s3_server().handled(fault):
        try:
            case.act(url)
            succeeded = True
        except HoldfastError:
            pass
    found = case.found(url)
    assert found == case.done if succeeded else found in case.failed, f"{fault}: {found}"
    return succeeded


@pytest.mark.parametrize("name", CASES)
def test_one_fault_at_any_request_does_no_harm(url: str, name: str) -> None:
    """G1, G2. Method: one fault at each request of an operation (by default, at each 41st), whose
    kind changes from request to request (`--all`: of every kind). The operation succeeds, since a
    request is sent again, and the bytes are right."""
    case, number = CASES[name], count()
    case.before(f"{url}/template")
    for at in count(step=1 if EVERYTHING else 41):
        for mode in MODES if EVERYTHING else [MODES[at % len(MODES)]]:
            fault, folder = Fault(mode, at, late_s=LATE_S), f"{url}/{next(number)}"
            copy(f"{url}/template", folder)
            assert run(case, folder, fault), str(fault)
        if not fault.disturbed:
            assert at > 5, "the operation sends requests"
            return


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("name", ["save", "replace"])
def test_any_answer_may_be_cut_in_the_middle(url: str, name: str, method: str) -> None:
    """G1, G2. Method: the answer to each request that begins or ends an upload, and to each (by
    default, to each third) that reads, ends after half of its body. The operation succeeds."""
    case, number = CASES[name], count()
    case.before(f"{url}/template")
    for at in count(step=1 if EVERYTHING or method == "POST" else 3):
        fault, folder = Fault("half", at, methods=(method,)), f"{url}/{next(number)}"
        copy(f"{url}/template", folder)
        assert run(case, folder, fault), str(fault)
        if not fault.disturbed:
            assert at > 1, "the operation sends such requests"
            return


@pytest.mark.parametrize(
    ("name", "mode"),
    every(
        7,
        [*product(["save", "replace", "prune"], ["503", "lost", "cut", "500", "refused", "half"])],
    ),
)
def test_a_store_that_stays_broken_loses_nothing(
    url: str, name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G2, G11. Method: from some request on, no request that changes the bucket is answered as
    it should be. The operation raises, or what it has saved is right. The checkpoints can be read;
    so can they after a start."""
    monkeypatch.setattr(cloud, "REQUEST_S", 1.0)
    monkeypatch.setattr(cloud, "_PATIENCE_S", 1.0)
    case, methods, number = CASES[name], ("PUT", "POST", "DELETE"), count()
    case.before(f"{url}/template")
    undisturbed, folder = Fault("500", at=1 << 30, methods=methods), f"{url}/{next(number)}"
    copy(f"{url}/template", folder)
    assert run(case, folder, undisturbed)
    for at in (0, undisturbed.count // 2):
        folder = f"{url}/{next(number)}"
        copy(f"{url}/template", folder)
        fault = Fault(mode, at, times=1 << 30, methods=methods)
        succeeded = run(case, folder, fault)
        # Otherwise the requests have their effect, which a save can read.
        assert not succeeded or mode in ("lost", "cut", "half"), str(fault)
        assert fault.disturbed, "a request was disturbed"
        put_in_order(ObjectStore(CloudBucket(folder)))
        assert case.found(folder) in (*case.failed, case.done), str(fault)
