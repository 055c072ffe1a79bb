"""Saves of a run that deduplicates: which files they link, what they write, what a load finds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from deduplicated import Run, files_of, flat, loaded, written_bytes
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.listing import survey, used_bytes
from holdfast.catalog.marks import mark_damaged
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.cli.main import main
from holdfast.errors import StorageError, UsageError
from holdfast.format.names import step_name
from holdfast.planning.shared_files import LINKED_FILES_MAX
from holdfast.saving.deduplicate import Deduplicator
from holdfast.spelling import spelled_bytes
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.testing.failing import FailingStore

BASE, ADAPTER = 300_000, 1_000
"""Elements of a frozen tensor, and of one that changes."""


def lora(step: int) -> dict[str, Any]:
    """A state in which little changes from step to step."""
    return {
        "model": {
            **{f"base.{n}": torch.full((BASE,), float(n)) for n in range(3)},
            "adapter": torch.full((ADAPTER,), float(step)),
        },
        "optimizer": {"moment": torch.full((ADAPTER,), -float(step)), "lr": 0.1 / step},
    }


def flip(file: Path, offset: int) -> None:
    """Flip a bit of a file in place."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_save_writes_only_what_has_changed(tmp_path: Path) -> None:
    """G19. Method: a large frozen state and a small one that changes; from the third save on, the
    bytes of new files are at most 1.05 times those that changed. Every step loads bit for bit."""
    run = Run(tmp_path)
    changed = 2 * 4 * ADAPTER
    for step in range(1, 7):
        saved = run.save(step, lora(step))
        written = written_bytes(tmp_path, step)
        assert saved.nbytes - saved.shared_nbytes == written
        if step > 2:
            assert written <= 1.05 * changed + 4096, "what changed, a value and the table"
    for step in range(1, 7):
        assert loaded(run.store, step) == flat(lora(step))
        assert verify(VerifyTarget(run.store, step_name(step))).good


# Stock torch warns that it runs without a process group.
@pytest.mark.filterwarnings("default")
def test_stock_dcp_loads_a_checkpoint_that_shares_files(tmp_path: Path) -> None:
    """G10, G19. Method: `dcp.load` of each of four steps."""
    run = Run(tmp_path)
    for step in range(1, 5):
        run.save(step, lora(step))
    for step in range(1, 5):
        state = {f"model.{name}": torch.zeros_like(t) for name, t in lora(1)["model"].items()}
        stock_load(state, checkpoint_id=tmp_path / step_name(step), no_dist=True)
        for name, tensor in lora(step)["model"].items():
            assert torch.equal(state[f"model.{name}"], tensor)


def test_consecutive_checkpoints_share_no_file(tmp_path: Path) -> None:
    """G19. Method: the inodes of all data files of six saves; the step before the previous one has
    the frozen data in the same file, the previous one has not."""
    run = Run(tmp_path)
    for step in range(1, 7):
        run.save(step, lora(step))
    inodes = [set(files_of(tmp_path, step).values()) for step in range(1, 7)]
    for earlier, later in pairwise(inodes):
        assert not earlier & later
    for earlier, later in zip(inodes, inodes[2:], strict=False):
        assert earlier & later


def test_damage_to_a_shared_file_leaves_every_other_checkpoint_good(tmp_path: Path) -> None:
    """G19. Method: one flipped bit in the largest file of a step; `verify` of each step."""
    run = Run(tmp_path)
    for step in range(1, 7):
        run.save(step, lora(step))
    largest = max((tmp_path / "step-6").glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip(largest, 100_000)
    good = [step for step in range(1, 7) if verify(VerifyTarget(run.store, step_name(step))).good]
    assert good == [1, 3, 5]


@pytest.mark.parametrize("damage", ["mark", "truncate", "table", "delete"])
def test_a_damaged_file_is_not_linked(tmp_path: Path, damage: str) -> None:
    """G19. Method: damage to the checkpoint that the next save would link; the save writes all of
    it anew, and is good."""
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step, lora(step))
    largest = max((tmp_path / "step-1").glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "mark":
        mark_damaged(run.store, 1, "found by a load")
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:-8])
    elif damage == "table":
        largest.write_bytes(largest.read_bytes()[:-8] + bytes(8))
    else:
        shutil.rmtree(tmp_path / "step-1")
    saved = run.save(3, lora(3))
    assert saved.shared_nbytes == 0
    assert loaded(run.store, 3) == flat(lora(3))
    assert verify(VerifyTarget(run.store, "step-3")).good


def test_a_file_that_cannot_be_linked_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G19. Method: a store that refuses the link; the log names the file."""

    def fail(verb: str, key: str) -> None:
        if verb == "link":
            raise StorageError(f"cannot link `{key}`: Too many links")

    run = Run(tmp_path, FailingStore(LocalStore(tmp_path), fail))
    with caplog.at_level(logging.WARNING, "holdfast"):
        for step in (1, 2, 3):
            run.save(step, lora(step))
    assert "Too many links; its tensors are written again" in caplog.text
    assert loaded(run.store, 3) == flat(lora(3))
    assert written_bytes(tmp_path, 3) > 3 * 4 * BASE


def test_a_file_is_read_after_a_number_of_links(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G19. Method: a check after two links. The first one finds the file good. Then a bit flips,
    and the next check finds it: that save writes the tensors again, and is good."""
    run = Run(tmp_path, check_every=2)
    for step in range(1, 10):
        assert (run.save(step, lora(step)).shared_nbytes > 0) == (step > 2)
    links = [run.manifest(step).shared for step in (1, 3, 5, 7, 9)]
    assert links == [{}, *({"__0_0.distcp": count} for count in (1, 2, 1, 2))]
    flip(tmp_path / "step-9" / "__0_0.distcp", 100_000)
    with caplog.at_level(logging.WARNING, "holdfast"):
        run.save(10, lora(10))
        assert not caplog.text
        assert run.save(11, lora(11)).shared_nbytes == 0
    assert "step-9`, `__0_0.distcp` `model.base.0` block 0: has checksum" in caplog.text
    good = [step for step in range(1, 12) if verify(VerifyTarget(run.store, step_name(step))).good]
    assert good == [2, 4, 6, 8, 10, 11]


def test_stale_bytes_of_a_shared_file_are_not_checked(tmp_path: Path) -> None:
    """Method: a flipped bit in a tensor that has changed since the file was written."""
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.save(step, lora(step))
    manifest = run.manifest(1)
    (chunk,) = manifest.tensors["model.adapter"].chunks
    assert chunk.data_offset is not None
    flip(tmp_path / "step-1" / chunk.file, chunk.data_offset)
    assert not verify(VerifyTarget(run.store, "step-1")).good
    assert verify(VerifyTarget(run.store, "step-3")).good
    assert loaded(run.store, 3) == flat(lora(3))


def test_a_file_of_which_little_is_used_is_given_up(tmp_path: Path) -> None:
    """Method: two of three large tensors change once; the file with the third is written anew, and
    from then on linked."""
    run, state = Run(tmp_path), lora(1)
    for step in range(1, 9):
        if step >= 3:
            state["model"]["base.0"] = torch.full((BASE,), 10.0)
            state["model"]["base.1"] = torch.full((BASE,), 11.0)
        run.save(step, state)
        assert loaded(run.store, step) == flat(state)
    size = sum(path.stat().st_size for path in (tmp_path / "step-8").glob("*.distcp"))
    assert size < 1.1 * 3 * 4 * BASE
    assert written_bytes(tmp_path, 8) < 4 * BASE / 10


def test_the_number_of_linked_files_is_bounded(tmp_path: Path) -> None:
    """Method: one of twenty tensors changes with each save, so each file stays in use for long."""
    run = Run(tmp_path)
    state = {"model": {f"expert.{n}": torch.full((20_000,), float(n)) for n in range(20)}}
    for step in range(1, 50):
        state["model"][f"expert.{step % 20}"] = torch.full((20_000,), float(step))
        run.save(step, state)
        assert loaded(run.store, step) == flat(state)
        assert len(files_of(tmp_path, step)) <= LINKED_FILES_MAX + 2


def test_a_step_saved_again_shares_no_file_with_the_one_before_or_after(tmp_path: Path) -> None:
    """G19. Method: the fourth step is saved twice, with other data."""
    run = Run(tmp_path)
    for step in (1, 2, 3, 4):
        run.save(step, lora(step))
    run.save(4, lora(40))
    run.save(5, lora(5))
    inodes = {step: {*files_of(tmp_path, step).values()} for step in (3, 4, 5)}
    assert not inodes[3] & inodes[4]
    assert not inodes[4] & inodes[5]
    assert loaded(run.store, 4) == flat(lora(40))
    assert loaded(run.store, 5) == flat(lora(5))


def test_a_run_that_resumes_after_a_gap_keeps_two_copies(tmp_path: Path) -> None:
    """G19. Method: the step between two that share a file is damaged, so the run knows only those
    two. The next save shares no file with the one resumed from, the later ones share again."""
    run = Run(tmp_path)
    for step in range(1, 5):
        run.save(step, lora(step))
    run.resume(4, before=2)
    shared = [run.save(step, lora(step)).shared_nbytes > 0 for step in (5, 6, 7)]
    assert shared == [False, True, True]
    inodes = [{*files_of(tmp_path, step).values()} for step in (4, 5, 6, 7)]
    for earlier, later in pairwise(inodes):
        assert not earlier & later


def test_other_tensors_need_no_other_settings(tmp_path: Path) -> None:
    """Method: a tensor is added, one is removed, one gets another shape and one another dtype, each
    with the same bytes."""
    run, state = Run(tmp_path), lora(1)
    for step in (1, 2):
        run.save(step, state)
    model = state["model"]
    del model["base.0"]
    model["added"] = torch.full((BASE,), 0.0)
    model["base.1"] = model["base.1"].view(3, -1)
    model["base.2"] = model["base.2"].view(torch.int32)
    for step in (3, 4, 5):
        run.save(step, state)
        assert loaded(run.store, step) == flat(state)
    assert not {*files_of(tmp_path, 3)} & {*files_of(tmp_path, 1)} - {"__0_0.distcp"}


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_links_its_own_files(tmp_path: Path, size: int) -> None:
    """G19. Method: replicated tensors, which the ranks divide between them, saved by two and four
    ranks; then the folder is continued by another number of ranks."""
    run = Run(tmp_path, size=size)
    state = {"model": {f"base.{n}": torch.randn(700_000) for n in range(4)}}
    for step in range(1, 5):
        state["model"]["adapter"] = torch.full((ADAPTER,), float(step))
        saved = run.save(step, state)
        assert loaded(run.store, step) == flat(state)
    assert saved.nbytes - saved.shared_nbytes < 20_000
    assert {name.split("_")[2] for name in files_of(tmp_path, 4)} == {*map(str, range(size))}
    other = Run(tmp_path, size=size // 2)
    other.resume(4)
    for step in range(5, 9):
        state["model"]["adapter"] = torch.full((ADAPTER,), float(step))
        saved = other.save(step, state)
        assert loaded(run.store, step) == flat(state)
    assert saved.nbytes - saved.shared_nbytes < 20_000


def test_a_copy_of_a_checkpoint_is_a_plain_checkpoint(tmp_path: Path) -> None:
    """Method: a folder copied file by file; the original is deleted."""
    run = Run(tmp_path / "run")
    for step in (1, 2, 3):
        run.save(step, lora(step))
    shutil.copytree(tmp_path / "run" / "step-3", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    store = LocalStore(tmp_path)
    assert verify(VerifyTarget(store, "copy")).good
    assert loaded(store, "copy") == flat(lora(3))


def test_a_shared_file_counts_once_in_the_space_used(tmp_path: Path) -> None:
    """Method: the sum over all checkpoints is that of the distinct inodes."""
    run = Run(tmp_path)
    for step in range(1, 6):
        run.save(step, lora(step))
    data = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("*/*.distcp")}
    rows = survey(LocalStore(tmp_path.parent), tmp_path.name)
    assert used_bytes(rows) == sum(data.values())
    assert sum(row.nbytes or 0 for row in rows) > 2 * used_bytes(rows)


def test_prune_and_doctor_count_a_shared_file_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: `prune` of the older step of each chain; `doctor` with room for what a save writes,
    then without."""
    run = Run(tmp_path)
    for step in range(1, 5):
        run.save(step, lora(step))
    own = {step: written_bytes(tmp_path, step) for step in (3, 4)}
    assert main(["prune", str(tmp_path), "--keep-latest-k", "2", "--dry-run"]) == 0
    files = [path.stat() for step in (1, 2) for path in (tmp_path / step_name(step)).iterdir()]
    freed = sum(status.st_size for status in files if status.st_nlink == 1)
    assert f"would remove 2 folders, {spelled_bytes(freed)}" in capsys.readouterr().out
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 2 * own[4])
    main(["doctor", str(tmp_path)])
    assert "the next save needs" not in capsys.readouterr().out
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 1_000)
    main(["doctor", str(tmp_path)])
    assert f"the next save needs {spelled_bytes(own[4])}" in capsys.readouterr().out


def test_a_store_without_links_is_refused_at_the_start(tmp_path: Path) -> None:
    """G19. Method: a store without the operation, and a folder whose file system refuses it; the
    folder is left empty but for the lock."""

    class Plain:
        url = "bucket:"

    with pytest.raises(UsageError, match="`bucket:` has neither"):
        Deduplicator(Catalog(Plain()), 0, check_every=0)  # type: ignore[arg-type]

    def fail(verb: str, key: str) -> None:
        if verb == "link":
            raise StorageError(f"cannot link `{key}`: Operation not supported")

    config = CheckpointConfig(enable=True, deduplicate=True)
    store = FailingStore(LocalStore(tmp_path), fail)
    with pytest.raises(UsageError, match="Operation not supported") as refused:
        CheckpointManager(None, model=nn.Linear(2, 2), config=config, store=store)
    assert "--checkpoint.no-deduplicate" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_the_fast_tier_is_refused(tmp_path: Path) -> None:
    """G8. Method: both settings in one configuration."""
    with pytest.raises(UsageError, match="does not work with"):
        CheckpointConfig(enable=True, deduplicate=True, local_folder=str(tmp_path))


class Trained(nn.Module):
    """A model with a frozen base and an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(300, 300).requires_grad_(False)
        self.adapter = nn.Linear(8, 8)


@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_deduplicates_also_after_a_resume(tmp_path: Path, async_mode: Any) -> None:
    """G19. Method: a manager in each mode saves, is closed, and another one resumes. The first save
    after the resume links the frozen weights, and what is loaded is what was saved."""
    config = CheckpointConfig(
        enable=True, interval=1, keep_latest_k=3, deduplicate=True, async_mode=async_mode
    )

    def train(num_steps: int) -> Mapping[str, torch.Tensor]:
        torch.manual_seed(1)
        model = Trained()
        optimizer = torch.optim.AdamW(model.adapter.parameters())
        with CheckpointManager(
            tmp_path, model=model, optimizers=optimizer, config=config
        ) as manager:
            start = int(manager.load())
            for step in range(start + 1, start + 1 + num_steps):
                model.adapter(torch.full((2, 8), float(step))).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                manager.save(step)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    train(4)
    trained = train(1)
    assert written_bytes(tmp_path, 5) < 4 * 300 * 300
    assert not {*files_of(tmp_path, 4).values()} & {*files_of(tmp_path, 5).values()}
    resumed = train(0)
    for name, tensor in trained.items():
        assert torch.equal(resumed[name], tensor)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-3", "step-4", "step-5"]


def test_the_last_save_with_the_model_alone_shares_nothing(tmp_path: Path) -> None:
    """Method: three full saves and the last one, whose folder other programs take over."""
    config = CheckpointConfig(enable=True, interval=1, deduplicate=True)
    model = Trained()
    optimizer = torch.optim.AdamW(model.adapter.parameters())
    with CheckpointManager(tmp_path, model=model, optimizers=optimizer, config=config) as manager:
        for step in range(1, 4):
            manager.save(step)
        manager.save(4, last_step=True)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "step-4").iterdir())


def test_a_save_without_enough_space_leaves_the_earlier_steps(tmp_path: Path) -> None:
    """G11. Method: a store with room for what changed only, then one with less."""
    store = MemoryStore()
    run = Run(tmp_path, store)
    for step in (1, 2):
        run.save(step, lora(step))
    store._capacity = store_bytes(store) + 30_000
    run.save(3, lora(3))
    store._capacity = store_bytes(store) + 3_000
    with pytest.raises(StorageError, match=r"needs .*, .* are free"):
        run.save(4, lora(4))
    assert [name for name in store.list() if name.startswith(".attempt")] == []
    for step in (1, 2, 3):
        assert loaded(store, step) == flat(lora(step))
    store._capacity = None
    run.save(4, lora(4))
    assert loaded(store, 4) == flat(lora(4))


def store_bytes(store: MemoryStore) -> int:
    free = MemoryStore.free_bytes
    store._capacity = 1 << 40
    return (1 << 40) - (free(store) or 0)
