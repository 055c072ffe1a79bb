"""Accelerator that exists only in tests: devices with streams whose work runs as late as it may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from holdfast import accelerator


@dataclass(eq=False, repr=False)
class Work:
    """One piece of queued work."""

    run: Callable[[], object]
    after: list[Work]
    """Work that must run first."""

    done: bool = False

    def finish(self) -> None:
        """Run this work, and before it all work that it depends on."""
        pending = [self]
        while pending:
            work = pending[-1]
            first = [earlier for earlier in work.after if not earlier.done]
            if first:
                pending += first
            else:
                if not work.done:
                    work.run()
                work.done = True
                pending.pop()


class FakeAccelerator:
    """In place of `torch.accelerator`: records calls, and queues work in streams.

    Work runs once somebody waits for it, or earlier, as the random numbers of `seed` have it. So
    work that nothing orders runs in an order that a real device could have.
    """

    def __init__(self, num_devices: int, seed: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_devices = num_devices
        self.locked: dict[int, int] = {}
        """Bytes that are page-locked, by address."""
        self.generators = Generators()
        self.status = 0
        """Status that the driver returns for a page lock; 0 is success."""
        self._random = Random(seed)
        self._lock = threading.RLock()
        self._local = threading.local()
        self._default = [Stream(self, torch.device("cuda", n)) for n in range(num_devices)]
        self._streams = [*self._default]

    def note(self, *call: Any) -> None:
        self.calls.append((threading.current_thread().name, *call))

    def current_accelerator(self) -> torch.device:
        return torch.device("cuda")

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.num_devices

    def current_device_index(self) -> int:
        return getattr(self._local, "index", 0)

    def set_device_index(self, index: int) -> None:
        self.note("device", index)
        self._local.index = index

    @contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before = self.current_device_index()
        self.set_device_index(index)
        yield
        self._local.index = before

    def _current(self) -> list[Stream]:
        if not hasattr(self._local, "streams"):
            self._local.streams = [*self._default]
        streams: list[Stream] = self._local.streams
        return streams

    def current_stream(self, device: torch.device) -> Stream:
        return self._current()[device.index]

    def stream(self, device: torch.device) -> Stream:
        """In place of `torch.Stream`."""
        self.note("stream", device.index)
        made = Stream(self, device)
        self._streams.append(made)
        return made

    def queue(self, device: torch.device, run: Callable[[], object]) -> Work:
        """Queue work in this thread's current stream of a device."""
        with self._lock:
            work = self.current_stream(device).add(run)
            if self._random.random() < 0.5:
                # Some work of some stream runs at any time.
                self._random.choice(self._streams).last.finish()
            return work


@dataclass(frozen=True, slots=True)
class FakeRuntime:
    """In place of `torch.cuda.cudart()`: counts the locked bytes."""

    fake: FakeAccelerator

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.fake.note("register", nbytes, self.fake.current_device_index(), flags)
        self.fake.locked[address] = nbytes
        return self.fake.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.fake.locked[address]
        return 0


class Stream:
    """In place of `torch.Stream`."""

    def __init__(self, fake: FakeAccelerator, device: torch.device) -> None:
        self.fake, self.device = fake, device
        self.last = Work(lambda: None, [])
        self._awaited: list[Work] = []
        self._before: list[tuple[int, Stream]] = []

    def add(self, run: Callable[[], object]) -> Work:
        self.last = Work(run, [self.last, *self._awaited])
        self._awaited = []
        return self.last

    def record_event(self) -> Event:
        self.fake.note("record", self.device.index)
        return Event(self.fake, self.device, self.last, [*self._awaited])

    def wait_event(self, event: Event) -> None:
        self.fake.note("wait", self.device.index)
        self._awaited += [event.work, *event.awaited]

    def synchronize(self) -> None:
        self.fake.note("synchronize", self.device.index)
        with self.fake._lock:
            self.last.finish()

    def __enter__(self) -> Stream:
        current, index = self.fake._current(), self.device.index
        self._before.append((self.fake.current_device_index(), current[index]))
        self.fake._local.index, current[index] = index, self
        return self

    def __exit__(self, *_: object) -> None:
        index, stream = self._before.pop()
        self.fake._current()[self.device.index] = stream
        self.fake._local.index = index


@dataclass(eq=False, repr=False)
class Event:
    """In place of `torch.Event`."""

    fake: FakeAccelerator
    device: torch.device
    work: Work
    awaited: list[Work] = field(default_factory=list)

    def synchronize(self) -> None:
        self.fake.note("event", self.device.index)
        with self.fake._lock:
            self.work.finish()


class DeviceTensor(torch.Tensor):
    """Tensor that says it is on a fake device, and whose copies are queued there."""

    fake: FakeAccelerator
    on: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        owners = [leaf for leaf in tree_leaves(args) if isinstance(leaf, DeviceTensor)]
        owner = owners[0]
        if len({one.on for one in owners}) > 1:
            raise RuntimeError("expected all tensors to be on the same device")
        plain = tree_map_only(DeviceTensor, lambda one: one.as_subclass(torch.Tensor), args)
        if func is torch.Tensor.copy_:
            work = owner.fake.queue(owner.on, lambda: plain[0].copy_(plain[1]))
            if not kwargs.get("non_blocking"):
                owner.fake.current_stream(owner.on).synchronize()
            return args[0] if work else None
        made = func(*plain, **kwargs)
        return on_device(made, owner.fake, owner.on) if isinstance(made, torch.Tensor) else made


def on_device(tensor: torch.Tensor, fake: FakeAccelerator, device: torch.device) -> DeviceTensor:
    """The tensor, as if it were on a device of `fake`."""
    made = tensor.as_subclass(DeviceTensor)
    made.fake, made.on = fake, device
    return made


class Generators:
    """The random number generators of all devices."""

    state = torch.zeros(3)

    def get_rng_state(self) -> torch.Tensor:
        return self.state

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state


class FakeTorch:
    """Torch with `fake` as its accelerator, for one module. Page-locked memory is ordinary."""

    def __init__(self, fake: FakeAccelerator) -> None:
        self.accelerator, self.Stream = fake, fake.stream
        self.cuda = SimpleNamespace(cudart=lambda: FakeRuntime(fake))

    def get_device_module(self, _: object) -> Generators:
        return self.accelerator.generators

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            self.accelerator.note("lock", *args)
        return torch.empty(*args, **kwargs)


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeAccelerator) -> None:
    """Let the module that knows devices see `fake` as torch's accelerator."""
    monkeypatch.setattr(accelerator, "torch", FakeTorch(fake))
