"""Which checkpoints retention keeps, and how it deletes the others."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from checkpoints import save_leaves
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.listing import survey
from holdfast.catalog.marks import damaged_steps, mark_damaged
from holdfast.comm import Solo
from holdfast.errors import StorageError
from holdfast.format.names import step_name
from holdfast.format.region import Region
from holdfast.manager import complete
from holdfast.manager.complete import CompleteCheckpoints
from holdfast.manager.policy import Retention
from holdfast.manager.resume import good_steps
from holdfast.manager.retention import Retainer
from holdfast.planning import index
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.testing.failing import FailingStore
from holdfast.testing.stores import put
from plans import save_regions


def manager(folder: Path, **settings: Any) -> CheckpointManager:
    config = CheckpointConfig(enable=True, **({"interval": 1, "keep_latest_k": 2} | settings))
    return CheckpointManager(folder, model=nn.Linear(3, 3), config=config)


def steps(folder: Path) -> list[int]:
    return Catalog(LocalStore(folder)).steps()


def damage(folder: Path, step: int) -> None:
    """Flip a byte of a tensor's data; the structure stays complete."""
    file = folder / step_name(step) / "__0_0.distcp"
    entry = holdfast.open(file.parent).tensors["weight"]
    data = bytearray(file.read_bytes())
    data[entry.chunks[0].data_offset or 0] ^= 1
    file.write_bytes(data)


def test_a_checkpoint_stays_while_any_rule_keeps_it(tmp_path: Path) -> None:
    """G5: every third, the two best, a pinned one, the latest two; a loss of NaN is never the
    best."""
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: nan, 5: 2.0, 6: 3.0, 7: 9.0, 8: 9.0, 9: 9.0, 10: 9.0}
    settings: Any = {"keep_every_n_steps": 3, "keep_best_k": 2}
    with manager(tmp_path, **settings) as held:
        for step, loss in losses.items():
            held.save(step, metrics={"loss": loss})
            if step == 4:
                put(LocalStore(tmp_path), ".pinned-step-4", b"")
    assert steps(tmp_path) == [2, 3, 4, 5, 6, 9, 10]
    assert holdfast.open(tmp_path / "step-5").manifest.metrics == {"loss": 2.0}
    assert str(holdfast.open(tmp_path / "step-4").manifest.metrics) == "{'loss': nan}"
    (tmp_path / ".pinned-step-4").unlink()
    with manager(tmp_path, **settings) as held:
        held.save(11, metrics=lambda: {"loss": 0.5})
    assert steps(tmp_path) == [2, 3, 6, 9, 10, 11]


def test_model_only_checkpoints_never_displace_resumable_ones(tmp_path: Path) -> None:
    """G5: the newest two full ones stay."""
    for last in (3, 5, 7, 9):
        with manager(tmp_path, interval=2) as held:
            for step in range(last - 1, last + 1):
                held.save(step, last_step=step == last)
    assert steps(tmp_path) == [6, 8, 9]
    with manager(tmp_path, interval=100) as held:
        held.save(10, last_step=True)
        held.save(11, last_step=True)
    assert steps(tmp_path) == [6, 8, 10, 11]


def test_a_checkpoint_that_proves_damaged_is_marked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G4, G5: the load that found the damage leaves a mark beside the checkpoint and nothing in it.
    Listings and later runs pass it over unread, and retention neither counts nor deletes it."""
    with manager(tmp_path) as held:
        held.save(1)
        held.save(2)
    damage(tmp_path, 2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "step-2").iterdir()}
    with manager(tmp_path, load_only=True) as held:
        assert held.load() == 1
    assert damaged_steps(LocalStore(tmp_path)) == {}
    with manager(tmp_path) as held:
        assert held.load() == 1
    assert "`weight`" in damaged_steps(LocalStore(tmp_path))[2]
    assert {file.name: file.read_bytes() for file in (tmp_path / "step-2").iterdir()} == before
    rows = survey(LocalStore(tmp_path.parent), tmp_path.name)
    assert [row.state for row in rows] == ["good", "damaged"]

    with caplog.at_level(logging.WARNING, "holdfast"), manager(tmp_path) as held:
        assert held.load() == 1
        assert "passed over step 2: found damaged before" in caplog.text
        for step in (3, 4):
            held.save(step)
    assert steps(tmp_path) == [1, 2, 3, 4], "1 is what that run stood on"
    with manager(tmp_path) as held:
        assert held.load() == 4
        held.save(5)
    assert steps(tmp_path) == [2, 4, 5]
    with manager(tmp_path) as held, pytest.raises(holdfast.DamagedError, match="weight"):
        held.load(2)


def test_the_cache_of_retention_never_hides_a_change(tmp_path: Path) -> None:
    """G5. Method: after each change by others (a mark, a truncated file, a damaged index, a step
    saved again, a deleted folder) the result with a cache equals the result without."""
    catalog = Catalog(LocalStore(tmp_path))
    looked = CompleteCheckpoints(catalog.store)

    def agree() -> list[int]:
        found = [list(good_steps(catalog, catalog.folders(), m)) for m in (looked, None)]
        assert found[0] == found[1]
        return [candidate.step for candidate in found[0]]

    with manager(tmp_path, keep_latest_k=0) as ours:
        for step in range(1, 7):
            ours.save(step, metrics={"loss": float(step)})
        assert agree() == [6, 5, 4, 3, 2, 1]
        mark_damaged(catalog.store, 6, "by others")
        os.truncate(tmp_path / "step-5" / "__0_0.distcp", 100)
        (tmp_path / "step-4" / "manifest.json").write_text("{}")
        ours.save(3, metrics={"loss": 7.0})
        shutil.rmtree(tmp_path / "step-2")
        assert agree() == [3, 1]


def test_files_that_a_save_does_not_look_at_are_looked_at_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G5. Method: one file is looked at per save. One file of an earlier checkpoint is cut, and the
    run stops counting the checkpoint once all files were looked at, and not much later."""
    monkeypatch.setattr(complete, "LOOKS_MAX", 1)
    catalog = Catalog(LocalStore(tmp_path))
    looked = CompleteCheckpoints(catalog.store)
    with manager(tmp_path, keep_latest_k=0) as ours:
        for step in range(1, 4):
            ours.save(step)
    assert len(list(good_steps(catalog, catalog.folders(), looked))) == 3
    os.truncate(tmp_path / "step-2" / "__0_0.distcp", 100)
    counts = [len(list(good_steps(catalog, catalog.folders(), looked))) for _ in range(9)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (3, 2)


def test_the_work_after_a_save_does_not_grow_with_checkpoints_or_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G5. Method: calls of the store after a save into folders of 4 and 40 checkpoints, of one
    file and of six files each; more files exist than one save looks at."""
    monkeypatch.setattr(complete, "LOOKS_MAX", 7)

    def calls(keep: int, size: int) -> int:
        counted: list[str] = []
        beneath = MemoryStore()
        catalog = Catalog(FailingStore(beneath, lambda verb, _: counted.append(verb)))
        retainer = Retainer(catalog, Retention(latest_k=keep))
        whole = torch.arange(12.0)
        rows = [[Region((2 * rank,), (2 * rank + 2,))] for rank in range(6)]
        held = rows if size == 6 else [[row for (row,) in rows]]
        for step in range(1, keep + 4):
            save_regions(beneath, step_name(step), {"w": (whole, held)}, size, step)
            counted.clear()
            retainer.saved(step)
            retainer.wait()
        assert len(catalog.steps()) == keep
        return len(counted)

    counts = [calls(4, 1), calls(40, 1), calls(4, 6), calls(40, 6)]
    # An index is looked at by two calls, a data file by one.
    assert max(counts) <= min(counts) + 7


def test_a_step_that_is_saved_again_loses_its_mark(tmp_path: Path) -> None:
    """G5: the next start also deletes the marks of deleted checkpoints."""
    store = LocalStore(tmp_path)
    with manager(tmp_path) as held:
        held.save(1)
        held.save(2)
        mark_damaged(store, 2, "a note")
        assert held.load() == 1
        held.save(2)
        assert damaged_steps(store) == {}
        assert held.load() == 2
        mark_damaged(store, 1, "a note")
    (tmp_path / "step-1").rename(tmp_path / "elsewhere")
    manager(tmp_path).close()
    assert not (tmp_path / ".damaged-step-1").exists()


def test_a_failed_deletion_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G5: two deletions fail. Each is logged; the checkpoint disappears from the list at once, its
    files at the third attempt."""
    failures = iter([True, True])

    def fail(verb: str, key: str) -> None:
        if verb == "remove" and key.startswith(".removing-step-1-") and next(failures, False):
            raise StorageError(f"cannot remove `{key}`: Input/output error")

    beneath = MemoryStore()
    catalog = Catalog(FailingStore(beneath, fail))
    retainer = Retainer(catalog, Retention(latest_k=2))
    left = []
    for step in range(1, 6):
        save(catalog, step)
        with caplog.at_level(logging.WARNING, "holdfast"):
            retainer.saved(step)
            retainer.wait()
        assert catalog.steps() == [s for s in (step - 1, step) if s]
        left.append([name for name in beneath.list() if name.startswith(".removing-step-1-")])
    assert [len(names) for names in left] == [0, 0, 1, 1, 0]
    assert caplog.text.count("Input/output error; the next save tries again") == 2


@pytest.mark.parametrize("path", ["notes", "sub/data"])
def test_a_checkpoint_with_files_of_the_user_stays_and_the_log_says_so_once(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G16. Method: a file in an old checkpoint of a run that keeps two. The run saves that step
    again: the old checkpoint gets another name, and the new one is deleted like any other."""
    with caplog.at_level(logging.WARNING, "holdfast"), manager(tmp_path) as held:
        for step in range(1, 4):
            held.save(step)
        (tmp_path / "step-3" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "step-3" / path).write_text("mine")
        for step in range(4, 8):
            held.save(step)
        assert steps(tmp_path) == [3, 6, 7]
        assert (tmp_path / "step-3" / path).read_text() == "mine"
        assert caplog.text.count("could not delete step 3: ") == 1
        assert f"`{path.partition('/')[0]}{'/' * ('/' in path)}`" in caplog.text
        held.save(3, force=True)
        (aside,) = tmp_path.glob("step-3.kept-*")
        assert f"step-3` was renamed to `{aside.name}`, since it holds" in caplog.text
        assert holdfast.check(aside) == []
        held.save(8)
        held.save(9)
    assert (aside / path).read_text() == "mine"
    assert steps(tmp_path) == [8, 9]


def test_the_rows_of_a_kept_checkpoint_are_checked_once_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G4, G5. Method: a new run saves beside three checkpoints, the newest with a damaged
    `index.bin`: it does not count. Later saves read no rows of earlier checkpoints."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", 0)
    with manager(tmp_path, keep_latest_k=0) as held:
        for step in (1, 2, 3):
            held.save(step)
    data = bytearray((tmp_path / "step-3/index.bin").read_bytes())
    data[9] ^= 1
    (tmp_path / "step-3/index.bin").write_bytes(data)
    read: list[str] = []

    def note(verb: str, key: str) -> None:
        if verb == "read" and key.endswith("index.bin"):
            read.append(key)

    catalog = Catalog(FailingStore(LocalStore(tmp_path), note))
    retainer = Retainer(catalog, Retention(latest_k=2))
    for step in (4, 5, 6):
        save(catalog, step)
        read.clear()
        retainer.saved(step)
        retainer.wait()
    assert steps(tmp_path) == [3, 5, 6]
    # Of those that are known, only the end is read again.
    counts = Counter(read)
    assert (counts["step-4/index.bin"], counts["step-5/index.bin"]) == (1, 1)
    assert counts["step-3/index.bin"] > 1, "it may have been replaced"


def save(catalog: Catalog, step: int) -> None:
    """A checkpoint of one tensor."""
    leaves = StateTree({"w": torch.full((3,), float(step))}).flatten()
    save_leaves(catalog, step_name(step), leaves, Solo(), kind="full")


def test_files_that_only_look_like_marks_are_ignored(tmp_path: Path) -> None:
    """G5: other names, and folders."""
    strange = (
        ".pinned-step-01",
        ".damaged-step-1-x",
        ".damaged-",
        ".pinned-best",
        "pinned",
    )
    for name in strange:
        put(LocalStore(tmp_path), name, b"theirs")
    with manager(tmp_path) as held:
        for step in range(1, 5):
            held.save(step)
    assert steps(tmp_path) == [3, 4]
    assert {path.name for path in tmp_path.iterdir()} >= set(strange)


def test_readers_find_a_checkpoint_that_was_being_replaced(tmp_path: Path) -> None:
    """G2: as after the death of a save between its renames. Readers rename nothing."""
    with manager(tmp_path) as held:
        held.save(1)
        held.save(2)
    expected = holdfast.open(tmp_path / "step-2").read("weight")
    (tmp_path / "step-2").rename(tmp_path / ".replaced-step-2-0123abcd")
    before = {path.name for path in tmp_path.iterdir()}
    state = {"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}
    holdfast.load(tmp_path / "step-2", state)
    assert torch.equal(state["weight"], expected)
    with manager(tmp_path, load_only=True) as held:
        assert held.load() == 2
        assert held.load(2) == 2
    rows = survey(LocalStore(tmp_path.parent), tmp_path.name)
    assert [(row.step, row.state) for row in rows] == [(1, "good"), (2, "good")]
    assert {path.name for path in tmp_path.iterdir()} == before
    with pytest.raises(holdfast.NotFoundError, match="step-3"):
        holdfast.load(tmp_path / "step-3", state)
    holdfast.save(tmp_path / "step-3", state)
    (tmp_path / ".replaced-step-3-0123abcd").mkdir()
    holdfast.load(tmp_path / "step-3", state)
