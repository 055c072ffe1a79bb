"""Random histories of a checkpoint folder: a good checkpoint and every promised one exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.power_cuts import PowerCut, Tree, left_by
from hypothesis import given, settings
from hypothesis import strategies as st

from crashes import recorded, store_of, tree_of
from holdfast import CheckpointConfig
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.marks import mark_damaged
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.errors import DamagedError, HoldfastError
from holdfast.format.names import step_name
from holdfast.loading.checkpoint import Checkpoint
from holdfast.manager.context import RunContext
from holdfast.manager.resume import newest_resumable
from holdfast.manager.saver import Saver
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import Store
from holdfast.testing.stores import put

CONFIG = CheckpointConfig(
    enable=True, keep_latest_k=3, keep_every_n_steps=5, keep_best_k=1, keep_best_mode="max"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a training job on the folder."""

    losses: list[float]
    """Loss of each checkpoint that it saves."""

    back: int
    """Number of checkpoints before the newest from which it resumes, by `load_step`. 0: the newest
    good one."""

    cut: float | None
    """Share of the run's operations before a power cut; None if the run ends normally."""

    version: Any
    seed: int
    damage: tuple[str, int] | None
    """Kind of damage after the run, and the checkpoint that is damaged; None if there is none."""

    pinned: int | None
    async_mode: Any


runs = st.builds(
    Run,
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=4),
    back=st.sampled_from([0, 0, 0, 1, 2]),
    cut=st.none() | st.floats(0, 1),
    version=st.sampled_from(["killed", "lost", "reordered", "torn"]),
    seed=st.integers(0, 5),
    damage=st.none() | st.tuples(st.sampled_from(["data", "short", "index"]), st.integers(0, 9)),
    pinned=st.none() | st.integers(0, 9),
    async_mode=st.sampled_from(["disabled", "async"]),
)


@dataclass(slots=True)
class Folder:
    """Checkpoint folder of the test, and the test's own records of it."""

    tree: Tree = field(default_factory=dict)
    may_go: set[int] = field(default_factory=set)
    """Checkpoints that no rule kept in the last run, so that retention may have deleted them."""


def value_of(step: int) -> torch.Tensor:
    return torch.full((40,), float(step))


def intact(store: MemoryStore) -> set[int]:
    """Return the steps whose checkpoints have the saved bytes. Checks that every checkpoint with
    valid checksums is among them."""
    found = set()
    for step, folder in Catalog(store).folders().items():
        try:
            data = Checkpoint(Source(store, folder, open_manifest(store, folder))).read("w")
        except HoldfastError:
            continue
        assert torch.equal(data, value_of(step)), step
        found.add(step)
    return found


def resume(store: MemoryStore, back: int) -> int | None:
    """Resume as the manager does: clean up, then take the newest checkpoint that loads; mark
    damaged ones."""
    assert execute(store, plan_cleanup(store.list())) == []
    catalog, below = Catalog(store), None
    good = sorted(intact(store))
    if 0 < back < len(good):
        return good[-1 - back]
    while True:
        found, _ = newest_resumable(catalog, below)
        if found is None:
            return None
        try:
            Checkpoint(Source(store, found.folder, found.manifest)).read("w")
            return found.step
        except DamagedError as error:
            below = found.step
            assert below is not None
            mark_damaged(store, below, error.what)


def kept_by_the_rules(
    counted: set[int], pins: set[int], losses: dict[int, float], stands_on: int | None
) -> set[int]:
    """Return the checkpoints that the rules keep, by a second implementation of the rules."""
    best = max(counted, key=lambda step: (losses[step], step))
    kept = {*sorted(counted)[-3:], best, *(step for step in counted if step % 5 == 0)}
    return kept | (counted & (pins | {stands_on or -1}))


def train(folder: Folder, run: Run) -> None:
    """Resume, save, and perhaps crash; then check the folder."""
    begin = store_of(folder.tree)
    there = intact(begin)
    first = resume(begin, run.back)
    assert (first is not None) == bool(there), "there is a good step, and a resume finds one"
    assert first is None or first in there
    assert run.back or first == max(there, default=None), "no newer good step is passed over"
    catalog = Catalog(begin)
    if there and run.pinned is not None:
        mark = f".pinned-step-{sorted(there)[run.pinned % len(there)]}"
        if mark not in begin.list():
            put(begin, mark, b"")
            begin.sync("")
    left_behind = [step for step in catalog.steps() if first is not None and step > first]
    steps = range((first or 0) + 1, (first or 0) + 1 + len(run.losses))
    new = dict(zip(steps, run.losses, strict=True))

    def copy(store: Store) -> None:
        for path, data in tree_of(begin).items():
            if data is None:
                store.make_folder(path)
            else:
                with store.create(path, len(data)) as writer:
                    writer.write(0, [data])

    def save(store: Store) -> None:
        config = CheckpointConfig(**{**vars_of(CONFIG), "async_mode": run.async_mode})
        saver = Saver(RunContext(Catalog(store), config, Solo()))
        saver.retainer.resumed(first if first is not None else -1, left_behind)
        for step, loss in new.items():
            leaves = StateTree({"w": value_of(step), "loss": loss}).flatten()
            saver.save(step, "full", lambda leaves=leaves: leaves, metrics={"loss": loss})  # type: ignore[misc]
        saver.collect()
        saver.retainer.wait()

    before, done = recorded(copy, save)
    at = len(done) if run.cut is None else int(run.cut * len(done))
    cut = PowerCut(at, "killed" if run.cut is None else run.version, run.seed)
    folder.tree = left_by([*before, *done], cut, durable=len(before))

    # An interrupted run may leave checkpoints that no rule keeps. They count for the rules too.
    folder.may_go = set()
    losses = losses_of_counted(begin)
    counted = set(losses) - set(left_behind)
    pins = {step for step in range(200) if f".pinned-{step_name(step)}" in begin.list()}
    for step, loss in new.items():
        counted.add(step)
        losses[step] = loss
        past = {other for other in counted if other <= step}
        folder.may_go |= past - kept_by_the_rules(past, pins, losses, first)
        folder.may_go.discard(step)
        counted -= folder.may_go
    found = store_of(folder.tree)
    assert execute(found, plan_cleanup(found.list())) == []
    left = intact(found)
    assert left >= (there - folder.may_go) - set(new), (there, folder.may_go, left)
    assert left or not there, "the last good step went"
    if run.cut is None:
        assert left >= set(new) - folder.may_go
    folder.tree = tree_of(found)


def losses_of_counted(store: MemoryStore) -> dict[int, float]:
    """Return the loss of each checkpoint that retention counts: those that are complete by
    structure, and not marked."""
    losses = {}
    for step, folder in Catalog(store).folders().items():
        if f".damaged-{step_name(step)}" in store.list():
            continue
        try:
            losses[step] = open_manifest(store, folder).metrics["loss"]
        except HoldfastError:
            continue
    return losses


def strike(folder: Folder, damage: tuple[str, int]) -> None:
    """Damage a checkpoint, but never the last good one."""
    store = store_of(folder.tree)
    good = sorted(intact(store))
    if len(good) < 2:
        return
    kind, which = damage
    name = step_name(good[which % len(good)])
    key = f"{name}/{'manifest.json' if kind == 'index' else '__0_0.distcp'}"
    data = bytearray(store.read(key, 0, 1 << 20))
    if kind == "short":
        del data[-1:]
    else:
        at = open_manifest(store, name).tensors["w"].chunks[0].data_offset if kind == "data" else 9
        data[at or 0] ^= 1
    folder.tree = {**folder.tree, key: bytes(data)}


def vars_of(config: CheckpointConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@settings(max_examples=60)
@given(st.lists(runs, min_size=2, max_size=6))
def test_a_good_checkpoint_and_every_promised_one_exist(lives: list[Run]) -> None:
    """G2, G4, G5. Method: runs resume from the newest or an earlier checkpoint, save in the
    foreground or the background, and crash at any operation in any way. Between runs, checkpoints
    are pinned or damaged.

    After each run, a resume finds a good checkpoint if one was left intact. Every checkpoint that a
    rule keeps is there bit for bit; the test implements the rules a second time.
    """
    folder = Folder()
    for run in lives:
        train(folder, run)
        if run.damage is not None:
            strike(folder, run.damage)
