"""Power cuts at every operation of sealed folders and of `holdfast.dcp`, on recorded real files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.power_cuts import cuts
from benchmarks.recording import recorded_folder, tree_after, tree_at, write_tree
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from crashes import SEEDS
from holdfast.dcp import Reader, Writer


def outcomes(
    folder: Path, save: Callable[[int], None], newest: Callable[[Path], object]
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
    for cut, tree in cuts([one for _, one in operations], durable=durable, seeds=SEEDS):
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
