"""Order of work on accelerators, tested with devices that run their work as late as they may."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

import fake_accelerator
import holdfast
import holdfast.dcp
from fake_accelerator import DeviceTensor, FakeAccelerator, on_device
from holdfast import accelerator
from holdfast.format.region import Region
from holdfast.loading import read
from holdfast.loading.read import Wanted, read_tensors
from holdfast.planning.file_layout import TensorItem, lay_out, lay_out_file
from holdfast.saving import digests
from holdfast.saving.stage import Snapshot, Staging
from holdfast.state.shard import Piece

DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))
SEEDS = range(6)


def fake(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> FakeAccelerator:
    made = FakeAccelerator(len(DEVICES), seed)
    fake_accelerator.use(monkeypatch, made)
    return made


def one_each(made: FakeAccelerator) -> dict[str, DeviceTensor]:
    """A tensor of zeros on each device."""
    return {f"on {d.index}": on_device(torch.zeros(1000), made, d) for d in DEVICES}


def in_thread(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name)
    thread.start()
    return thread


def copied_while_training(made: FakeAccelerator) -> set[float]:
    """Numbers that a background copy finds. Training has queued ones before, in streams that are
    not the default, and queues twos once the copy has ended."""
    tensors = one_each(made)
    plan = [(name, "float32", Region.whole(t.shape)) for name, t in tensors.items()]
    layout = lay_out_file(0, lay_out(plan), [])
    snapshot = Snapshot()
    snapshot.reserve(layout.nbytes, DEVICES)

    def tensor_of(item: TensorItem) -> torch.Tensor:
        return tensors[item.name]

    with ExitStack() as streams:
        for device in reversed(DEVICES):
            streams.enter_context(made.stream(device))
        made.set_device_index(1)
        for tensor in tensors.values():
            tensor.copy_(torch.ones(1000), non_blocking=True)
        staging = Staging(lambda: snapshot.copy(layout.tensors, tensor_of), DEVICES)
        thread = in_thread(staging.run, "background")
        staging.wait()
        for tensor in tensors.values():
            tensor.copy_(torch.full((1000,), 2.0), non_blocking=True)
        accelerator.synchronize(DEVICES)
    thread.join()
    return {float(n) for item in layout.tensors for n in snapshot.tensor_of(item)}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_background_copy_follows_training_on_each_device(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2. Method: training changes tensors on two devices before and after the copy."""
    assert copied_while_training(fake(monkeypatch, seed)) == {1.0}


def test_a_copy_that_does_not_wait_for_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails for wrong code. Method: streams that wait for no event, and a snapshot
    that does not wait for its copies."""
    monkeypatch.setattr(fake_accelerator.Stream, "wait_event", lambda *_: None)
    found = [copied_while_training(fake(monkeypatch, seed)) for seed in SEEDS]
    assert any(0.0 in numbers for numbers in found)


def test_the_background_thread_uses_the_device_and_new_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: the calls that a copy makes, in their order: an event on each of training's streams,
    then in the other thread a new stream for each device that waits for it."""
    made = fake(monkeypatch)
    copied_while_training(made)
    calls = [call[1:] for call in made.calls if call[0] == "background"]
    ordered = [("stream", 0), ("stream", 1), ("wait", 0), ("wait", 1), ("device", 1)]
    assert calls[:5] == ordered
    assert {*calls[5:]} == {("synchronize", 0), ("synchronize", 1)}
    trained = [call[1:] for call in made.calls if call[0] != "background"]
    assert [call for call in trained if call[0] == "record"] == [("record", 0), ("record", 1)]


def test_threads_of_a_process_without_devices_do_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: no call is recorded for tensors in host memory."""
    made = fake(monkeypatch)
    assert accelerator.devices_of([torch.zeros(1)]) == ()
    with accelerator.QueuedWork(()).followed():
        pass
    ring = accelerator.Ring(3, 100, ())
    assert ring.advance() is ring.current is ring.advance()
    assert made.calls == []


def test_digests_of_tensors_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method: equal tensors have equal digests, whatever their device. The sums of one device are
    stacked there, since tensors of two devices cannot be."""
    monkeypatch.setattr(digests, "_sums", lambda tensor: tensor.view(torch.int32)[:2].long())
    found = digests.digests_of(one_each(fake(monkeypatch)))
    assert len(found) == 2
    assert len({*found.values()}) == 1


def loaded(made: FakeAccelerator, folder: Path) -> set[str]:
    """Load small tensors, large ones, and columns of one, in many windows, to two devices whose
    zeros are still being written. Returns the names of those with wrong numbers."""
    stored = {
        "on 0": torch.rand(1000),
        "small": torch.rand(7, 3),
        "on 1": torch.rand(300, 100, 5),
        "columns": torch.rand(900, 600),
        "half": torch.rand(50_000).half(),
    }
    holdfast.save(folder, dict(stored))
    source = holdfast.open(folder)._source
    wanted, targets = [], {}
    for number, (name, tensor) in enumerate(stored.items()):
        region = Region.whole(tensor.shape)
        if name == "columns":
            region = Region((0, 100), (900, 350))
        shape = region.shape
        target = on_device(torch.empty(shape), made, DEVICES[number % 2])
        target.copy_(torch.zeros(shape), non_blocking=True)
        targets[name] = (target, tensor[region.slices()].float())
        wanted.append(Wanted(name, [Piece(region, Region.whole(shape))], target))
    read_tensors(source, wanted, threads=2)
    return {
        name
        for name, (target, expected) in targets.items()
        if not torch.equal(target.as_subclass(torch.Tensor), expected)
    }


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 32 KiB, so that each thread uses its buffers many times."""
    monkeypatch.setattr(read, "SMALL_BYTES", 8000)
    monkeypatch.setattr(read, "WINDOW_BYTES", 32 << 10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("small_windows")
def test_a_load_to_devices_keeps_its_buffers_until_they_are_copied(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: copies to two devices run as late as they may."""
    assert not loaded(fake(monkeypatch, seed), tmp_path / "one")


@pytest.mark.parametrize("owner", ["Event.synchronize", "Stream.wait_event"])
@pytest.mark.usefixtures("small_windows")
def test_a_load_that_does_not_wait_is_found(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above fails for wrong code. Method: events that nobody waits for, once where a
    buffer is reused, and once where training still writes the target."""
    kind, _, method = owner.partition(".")
    monkeypatch.setattr(getattr(fake_accelerator, kind), method, lambda *_: None)
    # Threads that the host delays may wait by chance: further seeds follow.
    assert any(loaded(fake(monkeypatch, seed), tmp_path / f"{seed}") for seed in range(40))


class DevicePlanner(DefaultLoadPlanner):
    """Planner of a state on a device: DCP would copy a `DeviceTensor`."""

    targets: dict[str, DeviceTensor]

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.targets[read_item.storage_index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is the target."""


@pytest.mark.parametrize(("num_local", "threads"), [(1, 16), (4, 8)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_load_by_dcp_to_a_device_uses_more_threads_than_one_to_host_memory(
    num_local: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a host of 32 cores. Each reading thread makes one stream."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_local))
    state = {f"w{number}": torch.rand(50_000) for number in range(40)}
    holdfast.save(tmp_path / "one", dict(state))
    made = fake(monkeypatch)
    planner = DevicePlanner()
    planner.targets = {name: on_device(torch.zeros(50_000), made, DEVICES[0]) for name in state}
    empty = {name: torch.zeros(50_000) for name in state}
    reader = holdfast.dcp.Reader(tmp_path / "one")
    dcp_load(empty, storage_reader=reader, planner=planner, no_dist=True)
    assert len([call for call in made.calls if call[1] == "stream"]) == threads
    for name, target in planner.targets.items():
        assert torch.equal(target.as_subclass(torch.Tensor), state[name])


def test_the_state_of_generators_has_the_kind_of_the_device_as_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Method: restore a state with keys of this device and of another."""
    made = fake(monkeypatch)
    assert accelerator.rng_states() == {"cuda": made.generators.state}
    accelerator.set_rng_states({"cuda": torch.ones(3), "xpu": torch.zeros(3)})
    assert torch.equal(made.generators.state, torch.ones(3))
    monkeypatch.setattr(FakeAccelerator, "is_available", lambda _: False)
    assert accelerator.rng_states() == {}
