"""Checkpoints whose chunks are in `index.bin`: loaded in other layouts, damaged, replaced."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from checkpoints import save_leaves, save_step, state
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.listing import survey
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.source import Source
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.comm import Ranks, Solo
from holdfast.errors import DamagedError
from holdfast.format import checksum
from holdfast.format.chunks import ChunkRows
from holdfast.format.region import Region
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.loading.opening import read_on_all
from holdfast.planning import index
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.memory import MemoryStore
from holdfast.testing.ranks import run_ranks, try_ranks
from plans import save_regions


@pytest.fixture(autouse=True)
def rows() -> Iterator[None]:
    """Let every save write `index.bin`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LISTED_CHUNKS_MAX", 0)
        yield


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@settings(max_examples=25)
@given(st.data())
def test_any_region_is_read_from_any_grid_of_any_number_of_ranks(data: st.DataObject) -> None:
    """G6. Method: two tensors of numbered elements, divided into grids over several ranks; any
    regions, compared with slices."""
    size = data.draw(st.integers(1, 4))
    wholes, held = {}, {}
    for name in ("a", "b"):
        shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        cells = [Region((), ())]
        for length in shape:
            cuts = sorted({0, length, *data.draw(st.sets(st.integers(0, length), max_size=3))})
            cells = [Region((*c.start, a), (*c.stop, b)) for c in cells for a, b in pairwise(cuts)]
        of_rank: list[list[Region]] = [[] for _ in range(size)]
        for cell in cells:
            of_rank[data.draw(st.integers(0, size - 1))].append(cell)
        wholes[name] = torch.arange(float(torch.Size(shape).numel())).view(shape)
        held[name] = wholes[name], of_rank
    store = MemoryStore()
    save_regions(store, "one", held, size)
    checkpoint = Checkpoint(Source(store, "one", open_manifest(store, "one")))
    for name, whole in wholes.items():
        assert isinstance(checkpoint.tensors[name].chunks, ChunkRows)
        assert torch.equal(checkpoint.read(name), whole)
        slices = tuple(
            slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in whole.shape
        )
        assert torch.equal(checkpoint.read(name, slices), whole[slices])


def blank() -> dict[str, Any]:
    saved: dict[str, Any] = state()
    return {
        name: {
            key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
            for key, value in component.items()
        }
        for name, component in saved.items()
    }


def is_loaded(found: dict[str, Any]) -> bool:
    saved: dict[str, Any] = state()
    return all(
        torch.equal(found[name][key], value) if isinstance(value, torch.Tensor) else True
        for name, component in saved.items()
        for key, value in component.items()
    )


@pytest.mark.parametrize("replicas", ["read", "broadcast"])
def test_every_rank_reads_its_own_rows(tmp_path: Path, replicas: Any) -> None:
    """G6. Method: three ranks load what two have saved; only rank 0 opens it."""
    path = save_step(tmp_path)
    assert (path / "index.bin").exists()
    store = LocalStore(tmp_path)

    def work(ranks: Ranks) -> bool:
        found = blank()

        def read(opened: Opened) -> None:
            tree = StateTree(found)
            load_tree(opened.source(store), tree, ranks=ranks, replicas=replicas)

        read_on_all(ranks, store, lambda: open_in(store, path.name), read)
        return is_loaded(found)

    assert run_ranks(3, work) == [True] * 3


def test_damaged_rows_are_found_by_a_load_and_by_verify_and_named(tmp_path: Path) -> None:
    """G3. Method: a byte of the rows, then one of their table; a load by two ranks that began
    before, opening, `verify` and `verify --quick`."""
    path = save_step(tmp_path)
    store = LocalStore(tmp_path)
    assert verify(VerifyTarget(store, path.name)).good
    nbytes = (path / "index.bin").stat().st_size
    for position in (8, nbytes - 3):
        # A rank gets it in this form, without the table that rank 0 has read.
        opened = pickle.loads(pickle.dumps(open_in(store, path.name)))
        flip(path / "index.bin", position)

        def work(ranks: Ranks, opened: Opened = opened) -> None:
            load_tree(opened.source(store), StateTree(blank()), ranks=ranks)

        for outcome in try_ranks(2, work):
            assert isinstance(outcome, DamagedError)
            assert outcome.file == str(path / "index.bin")
        with pytest.raises(DamagedError, match=r"`index\.bin` (block 0|its table)"):
            open_in(store, path.name)
        for quick in (False, True):
            (finding,) = verify(VerifyTarget(store, path.name, quick)).findings
            assert (finding.concern, finding.file) == ("index", "index.bin")
        flip(path / "index.bin", position)
    assert verify(VerifyTarget(store, path.name)).good


def forge_row(path: Path) -> None:
    """Move the first item of `index.bin` outside of its file, under valid checksums."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    content = bytearray((path / "index.bin").read_bytes()[: manifest["index"][1]])
    content[8:16] = struct.pack("<Q", 1 << 40)
    put_rows(path, manifest, content)


def put_rows(path: Path, manifest: dict[str, Any], content: bytearray) -> None:
    """Write `index.bin` and `manifest.json` with these rows and members, and valid checksums."""
    table = checksum.pack(checksum.block_checksums(memoryview(content), 4096))
    (path / "index.bin").write_bytes(content + table)
    manifest["index"][2] = checksum.to_hex([checksum.checksum(table)])
    text = json.dumps(manifest, separators=(",", ":")).encode()
    end = f',"checksum":"{checksum.to_hex([checksum.checksum(text)])}"}}'.encode()
    (path / "manifest.json").write_bytes(text[:-1] + end)


def test_a_process_survives_a_row_that_contradicts_the_manifest(tmp_path: Path) -> None:
    """G8. Method: a process of its own loads a forged row several times and collects garbage, since
    an error that kept an iterator over the row's bytes would crash Python 3.11."""
    holdfast.save(tmp_path / "one", {f"w{number}": torch.ones(4) for number in range(3)})
    forge_row(tmp_path / "one")
    script = """
import gc, sys, torch, holdfast
for _ in range(20):
    try:
        holdfast.load(sys.argv[1], {f"w{number}": torch.zeros(4) for number in range(3)})
    except holdfast.FormatError as error:
        assert "contradicts the manifest" in str(error), error
    else:
        raise AssertionError("loaded")
    gc.collect()
"""
    command = [sys.executable, "-c", script, str(tmp_path / "one")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("wrong", ["longest", "order"])
def test_verify_finds_rows_in_which_a_load_would_miss_a_chunk(tmp_path: Path, wrong: str) -> None:
    """G3, G6. Method: a manifest whose `longest` is too small, or two rows in the wrong order,
    under valid checksums. Reads of parts fail, and `verify` says why."""
    whole = torch.arange(64.0).view(16, 4)
    halves = [[Region((start, 0), (start + 4, 4))] for start in range(0, 16, 4)]
    save_regions(LocalStore(tmp_path), "one", {"w": (whole, halves)}, 4)
    path = tmp_path / "one"
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    content = bytearray((path / "index.bin").read_bytes()[: manifest["index"][1]])
    if wrong == "longest":
        manifest["tensors"]["w"]["rows"][2] = 0
    else:
        row = len(content) // 4
        content[:row], content[2 * row : 3 * row] = content[2 * row : 3 * row], content[:row]
    put_rows(path, manifest, content)
    opened = holdfast.open(path)
    with pytest.raises(DamagedError, match="its chunks hold"):
        _ = [opened.read("w", (slice(start, start + 2),)) for start in range(0, 16, 2)]
    (finding,) = verify(VerifyTarget(LocalStore(tmp_path), "one")).findings
    said = {"longest": "longest chunk along dim 0 has 4 elements, `rows` says 0"}
    assert finding.entry == "w"
    assert said.get(wrong, "its rows are not sorted: row 1 starts at [4, 0]") in finding.what


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_checkpoint_without_all_its_rows_does_not_open(tmp_path: Path, damage: str) -> None:
    """G3. Method: `index.bin` deleted, cut and extended."""
    path = save_step(tmp_path)
    data = (path / "index.bin").read_bytes()
    (path / "index.bin").unlink()
    if damage != "missing":
        (path / "index.bin").write_bytes(data[:-8] if damage == "short" else data + b"8 bytes.")
    with pytest.raises(DamagedError, match=r"index\.bin"):
        holdfast.open(path)
    report = verify(VerifyTarget(LocalStore(tmp_path), path.name))
    assert {finding.file for finding in report.findings} == {"index.bin"}


def test_a_run_passes_over_a_checkpoint_with_damaged_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G4. Method: two checkpoints, a bit of the newer one's rows flipped. Every later run finds the
    damage when it opens the checkpoint, so it needs no mark."""
    config = CheckpointConfig(enable=True, interval=1)

    def made() -> CheckpointManager:
        torch.manual_seed(0)
        return CheckpointManager(tmp_path, model=torch.nn.Linear(3, 3), config=config)

    with made() as manager:
        manager.save(1)
        manager.save(2)
    flip(tmp_path / "step-2/index.bin", 9)
    with caplog.at_level(logging.WARNING), made() as manager:
        assert manager.load().step == 1
    assert "passed over step 2" in caplog.text
    assert "index.bin" in caplog.text
    rows = survey(LocalStore(tmp_path.parent), tmp_path.name)
    assert [row.state for row in rows] == ["good", "damaged"]


def test_a_load_of_rows_that_are_replaced_gives_the_new_checkpoint() -> None:
    """G2. Method: the checkpoint is saved again, with other chunks, between its opening and its
    load."""
    store = MemoryStore()

    def save(tensors: dict[str, torch.Tensor]) -> None:
        leaves = StateTree(tensors).flatten()
        save_leaves(Catalog(store), "step-1", leaves, Solo(), step=1, kind="full")

    save({"w": torch.zeros(4)})
    opened = [open_in(store, "step-1")]
    save({"a": torch.ones(40, 2), "w": torch.ones(4)})

    def find() -> Opened:
        return opened.pop() if opened else open_in(store, "step-1")

    found = {"w": torch.full((4,), 7.0)}

    def read(opened: Opened) -> None:
        load_tree(opened.source(store), StateTree(found), ranks=Solo())

    read_on_all(Solo(), store, find, read)
    assert torch.equal(found["w"], torch.ones(4))


def test_a_manifest_keeps_few_chunks_and_not_many(tmp_path: Path) -> None:
    """Method: as many chunks as a manifest lists, and one more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LISTED_CHUNKS_MAX", 3)
        tensors = {str(number): torch.ones(2) for number in range(4)}
        holdfast.save(tmp_path / "many", tensors)
        tensors.pop("3")
        holdfast.save(tmp_path / "few", tensors)
    assert [(tmp_path / name / "index.bin").exists() for name in ("many", "few")] == [True, False]
    assert holdfast.check(tmp_path / "many") == holdfast.check(tmp_path / "few") == []
