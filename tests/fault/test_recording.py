"""The record of code that works on a folder is complete."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from pathlib import Path

import torch
from benchmarks.power_cuts import Operation
from benchmarks.recording import merged, recorded_folder, tree_after, tree_at, write_tree
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from checkpoints import save_leaves
from crashes import recorded
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Solo
from holdfast.format.names import MANIFEST
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore
from holdfast.storage.store import Store


def test_every_way_to_change_a_folder_is_recorded(tmp_path: Path) -> None:
    """Method: `open` in its modes, `os`, `pathlib` and `shutil`, from two threads, and through a
    link; replaying the record gives the same folder."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)

    def work() -> None:
        (tmp_path / "link" / "text").write_text("é" * 9000)

    with recorded_folder(root) as done:
        with open(root / "a", "wb") as file:  # noqa: PTH123 - what is tested
            file.write(b"1" * 20_000)
            file.seek(5)
            file.write(b"2")
        with (root / "a").open("r+b") as both:
            both.seek(30_000)
            both.write(b"3")
            both.truncate(25_000)
        with (root / "a").open("ab") as file:
            file.write(b"4")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        os.makedirs(root / "b/c")  # noqa: PTH103 - what is tested
        shutil.copyfile(root / "a", root / "b/c/a")
        descriptor = os.open(root / "low", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, 100)
        os.pwritev(descriptor, [b"12", b"34"], 50)
        os.write(descriptor, b"5")
        os.fsync(descriptor)
        os.ftruncate(descriptor, 60)
        os.close(descriptor)
        shutil.copytree(root / "b", root / "gone")
        shutil.rmtree(root / "gone")
        (root / "low").rename(root / "lower")
        os.replace(root / "lower", root / "text")  # noqa: PTH105 - what is tested
        (tmp_path / "elsewhere").write_text("not seen")
    after = tree_at(root)
    (root / "later").write_text("not seen")
    operations = merged([done])
    assert tree_after(operations) == after
    assert [o.path for o in operations if o.verb == "sync_file"] == ["low"]
    write_tree(after, tmp_path / "copy")
    assert tree_at(tmp_path / "copy") == after


def test_saves_by_stock_dcp_and_by_the_manager_are_recorded_completely(tmp_path: Path) -> None:
    """Method: saves, saves in place and retention on real folders."""
    module = torch.nn.Linear(100, 100)
    with recorded_folder(tmp_path / "stock") as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            stock_save(module.state_dict(), checkpoint_id=tmp_path / "stock/step-1")
    assert tree_after(merged([done])) == tree_at(tmp_path / "stock")
    config = CheckpointConfig(enable=True, interval=1, keep_latest_k=2)
    with (
        recorded_folder(tmp_path / "ours") as done,
        CheckpointManager(tmp_path / "ours", model=module, config=config) as manager,
    ):
        for step in (1, 2, 3, 3):
            manager.save(step)
    assert tree_after(merged([done])) == tree_at(tmp_path / "ours")


def test_a_store_in_memory_records_the_operations_of_a_local_one(tmp_path: Path) -> None:
    """G2. Method: the same saves, a deletion and a cleanup on both give the same operations in the
    same order. So crash points found in memory exist on a disk."""

    def work(store: Store) -> None:
        store.make_folder("")
        catalog = Catalog(store)
        for name in ("step-1", "step-2", "step-1"):
            leaves = StateTree({"w": torch.arange(30_000), "n": 1}).flatten()
            save_leaves(catalog, name, leaves, Solo())
        catalog.store.remove(catalog.set_aside_for_deletion("step-2"))

    with recorded_folder(tmp_path) as done:
        work(LocalStore(tmp_path))
    (in_memory,) = recorded(work)
    on_disk = merged([done])

    def shape(operations: list[Operation]) -> list[tuple[str, str, int, int]]:
        """Return each operation, without the digits of a manifest that depend on the duration of
        its save."""
        shapes = []
        for operation in operations:
            name = operation.path.rpartition("/")[2]
            is_content = name == MANIFEST and operation.verb in ("resize", "write")
            size = (0, 0) if is_content else (operation.offset, len(operation.data))
            shapes.append((operation.verb, name if name == MANIFEST else "", *size))
        return [operation for operation in shapes if operation[0] != "unlink"]

    assert shape(on_disk) == shape(in_memory)
    gone = sorted(o.path.rpartition("/")[2] for o in on_disk if o.verb == "unlink")
    assert len(gone) == len([o for o in in_memory if o.verb == "unlink"])
