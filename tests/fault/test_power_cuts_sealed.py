"""Power cuts at every operation of sealed folders and of `holdfast.dcp`, on recorded real files."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from benchmarks.power_cuts import cuts
from benchmarks.recording import recorded_folder, tree_after, tree_at, write_tree
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from crashes import SEEDS
from extent import EVERYTHING, some
from holdfast.comm import Solo
from holdfast.dcp import Reader, Writer
from holdfast.hosts.background import BackgroundSync
from holdfast.hosts.files import published
from holdfast.hosts.lightning import good_at
from holdfast.hosts.sealing import delete, sealed_by_all


def outcomes(
    folder: Path,
    save: Callable[[int], None],
    newest: Callable[[Path], object],
    seeds: Sequence[int] = SEEDS,
) -> list[tuple[int, object]]:
    """What the next start finds after each cut of the second of two saves: the number of operations
    of that save before the cut, and the result of `newest`."""
    root = folder / "root"
    root.mkdir()
    with recorded_folder(root) as operations:
        save(1)
        durable = len(operations)
        save(2)
    assert tree_after([operation for _, operation in operations]) == tree_at(root)
    found = []
    for cut, tree in cuts([one for _, one in operations], durable=durable, seeds=seeds):
        left = folder / "left"
        write_tree(tree, left)
        found.append((cut.at, newest(left)))
        shutil.rmtree(left)
    return found


def write_files(folder: Path, number: int) -> None:
    """What another program writes: two files and a folder, neither of them synced."""
    (folder / "inner").mkdir()
    for name in ("weights.bin", "inner/optimizer.bin"):
        with open(folder / name, "wb") as file:  # noqa: PTH123 - the recorder replaces `open`
            file.write(bytes([number]) * 300_000)


def seal(root: Path, name: str, number: int) -> None:
    with holdfast.sealed(root / name, overwrite=True) as folder:
        write_files(folder, number)


def number_in(path: Path | None) -> int | None:
    """The number in a sealed folder, all of whose files must have it."""
    if path is None:
        return None
    files = [path / "weights.bin", path / "inner/optimizer.bin"]
    numbers = {byte for file in files for byte in set(file.read_bytes())}
    assert len(numbers) == 1, "a mixture of two saves"
    return numbers.pop()


def test_a_sealed_folder_beside_another(tmp_path: Path) -> None:
    """G1, G2. Method: the newest good folder after every cut is the first or the second, whole."""
    root = tmp_path / "root"
    found = outcomes(
        tmp_path,
        lambda number: seal(root, f"checkpoint-{number}", number),
        lambda left: number_in(holdfast.newest_good(left)),
    )
    assert {number for _, number in found} == {1, 2}
    last = max(at for at, _ in found)
    assert {number for at, number in found if at == last} == {2}


def test_a_sealed_folder_that_replaces_another(tmp_path: Path) -> None:
    """G1, G2. Method: the folder after every cut is the old one or the new one, whole; the next
    save finds nothing in its way."""
    root = tmp_path / "root"

    def newest(left: Path) -> int | None:
        number = number_in(holdfast.newest_good(left, "a-*"))
        seal(left, "a-1", 3)
        assert [path.name for path in left.iterdir()] == ["a-1"]
        assert number_in(left / "a-1") == 3
        return number

    found = outcomes(tmp_path, lambda number: seal(root, "a-1", number), newest)
    assert {number for _, number in found} == {1, 2}


def seal_later(background: BackgroundSync, root: Path, number: int) -> None:
    """As hosts do: published before it is synced, then rotation, which keeps one checkpoint."""
    path = root / f"checkpoint-{number}"
    with sealed_by_all(
        str(path), ranks=Solo(), publishes=True, background=background, moves_aside=True
    ) as folder:
        write_files(folder, number)
    for older in root.glob("checkpoint-*"):
        if older != path:
            background.delete(str(older), partial(delete, older))


def test_a_sealed_folder_that_is_synced_in_the_background(tmp_path: Path) -> None:
    """G1, G2. Method: two saves, with rotation, after a durable one. The newest good folder after
    every cut is one of the three, whole, and the next save finds nothing in its way."""
    root = tmp_path / "root"
    background = BackgroundSync()
    calls = count()

    def save(number: int) -> None:
        seal_later(background, root, number)
        if number == 2:
            # Before the sync has ended: the first checkpoint must still be there afterwards.
            seal_later(background, root, 3)
        background.wait()

    def newest(left: Path) -> int | None:
        number = number_in(holdfast.newest_good(left))
        if next(calls) % (1 if EVERYTHING else 4):
            return number
        later = BackgroundSync()
        seal_later(later, left, 4)
        later.wait()
        # Nobody can tell that a folder without its seal is a checkpoint, so it stays.
        sealed = [path.parent.name for path in left.glob("*/holdfast.seal")]
        assert sealed == ["checkpoint-4"]
        assert all(path.name.startswith("checkpoint-") for path in left.iterdir())
        return number

    found = outcomes(tmp_path, save, newest, seeds=some(SEEDS, 1))
    assert {number for _, number in found} == {1, 2, 3}
    last = max(at for at, _ in found)
    assert {number for at, number in found if at == last} == {3}


def test_a_file_that_replaces_another_in_the_background(tmp_path: Path) -> None:
    """G1, G2. Method: as Lightning saves `step=2` and replaces `last`. After every cut a resume by
    `last` finds the bits of the first save or of the second; the next save cleans up."""
    root = tmp_path / "root"
    background = BackgroundSync()

    def save(number: int, root: Path = root, background: BackgroundSync = background) -> None:
        for name in (f"step={number}.ckpt", "last.ckpt"):
            with published(root / name, background) as file:
                torch.save({"w": torch.full((3000,), float(number)), "n": number}, file)
        older = root / f"step={number - 1}.ckpt"
        background.delete(str(older), partial(older.unlink, missing_ok=True))
        background.wait()

    def newest(left: Path) -> int:
        for older in [*left.glob(".kept-*"), *left.glob("step=1.*")]:
            # The recorded tree has no times of modification, by which the newest is chosen.
            os.utime(older, (0, 0))
        state = torch.load(good_at(left / "last.ckpt"), weights_only=True)
        assert set(state["w"].tolist()) == {float(state["n"])}
        save(3, left, BackgroundSync())
        names = {path.name for path in left.iterdir()}
        assert {"last.ckpt", "step=3.ckpt"} <= names <= {"last.ckpt", "step=3.ckpt", "step=1.ckpt"}
        return int(state["n"])

    found = outcomes(tmp_path, save, newest)
    assert {number for _, number in found} == {1, 2}
    last = max(at for at, _ in found)
    assert {number for at, number in found if at == last} == {2}


def test_a_save_by_dcp_that_replaces_another(tmp_path: Path) -> None:
    """G1, G2. Method: as above, with `dcp.save` and `dcp.load`."""
    warnings.simplefilter("ignore")
    root = tmp_path / "root"

    def save(number: int) -> None:
        state = {"w": torch.full((1000,), float(number)), "n": number}
        dcp_save(state, storage_writer=Writer(root / "a"))

    def newest(left: Path) -> int:
        state: dict[str, Any] = {"w": torch.zeros(1000), "n": 0}
        dcp_load(state, storage_reader=Reader(left / "a"))
        assert set(state["w"].tolist()) == {float(state["n"])}
        return int(state["n"])

    found = outcomes(tmp_path, save, newest)
    assert {number for _, number in found} == {1, 2}
