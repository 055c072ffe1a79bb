"""Small checkpoints in every format for the tests, and functions that damage a file."""

from __future__ import annotations

import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from holdfast.catalog.catalog import Catalog
from holdfast.comm import Ranks
from holdfast.format import manifest as manifests
from holdfast.format.manifest import Manifest
from holdfast.format.names import MANIFEST
from holdfast.saving.planner import Planner
from holdfast.saving.save import Saved, begin_save, finish_save
from holdfast.state.objects import StateTree
from holdfast.state.tree import FlatState
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import run_ranks
from manifest_bytes import encode

STEP = 7


def contents(path: Path) -> dict[str, Any]:
    """Return every tensor and value of a checkpoint by name."""
    checkpoint = holdfast.open(path)
    found: dict[str, Any] = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return found | {name: checkpoint.value(name) for name in checkpoint.manifest.values}


def differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the names that only one of the two has, or whose bits or values differ."""

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)

    both = found.keys() & expected.keys()
    differ = {name for name in both if not same(found[name], expected[name])}
    return sorted((found.keys() ^ expected.keys()) | differ)


def others(folder: Path) -> None:
    """Write a file as Lightning does, and the state dict of a compiled module."""
    logs = folder / "lightning_logs/version_0/checkpoints"
    logs.mkdir(parents=True)
    weights = {"weight": torch.ones(3, 4)}
    contents = {"state_dict": weights, "epoch": 1, "hyper_parameters": Namespace(lr=0.1)}
    torch.save(contents, logs / "epoch=1-step=20.ckpt")
    torch.save({"_orig_mod.weight": torch.ones(3, 4)}, folder / "compiled.pt")


def state() -> dict[str, object]:
    """Return a state with values, and with tensors of several sizes and dtypes.

    One tensor has several blocks, some are empty or tied. Their bytes are random, so that a test
    notices every change of a byte.
    """
    made = torch.Generator().manual_seed(3)
    shared = torch.randn(9, 4, generator=made)
    return {
        "model": {
            "large": torch.randint(1, 256, (2_300_000,), dtype=torch.uint8, generator=made),
            "half": torch.randn(70, 40, generator=made).to(torch.bfloat16),
            "tied": shared,
            "tied_too": shared,
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(1.5),
        },
        "optimizer": {"moment": torch.randn(300, 90, generator=made), "lr": 0.1},
        "train_state": {"step": STEP, "text": "value" * 100},
    }


def save_leaves(
    catalog: Catalog,
    name: str,
    leaves: FlatState,
    ranks: Ranks,
    *,
    hosts: Sequence[str] | None = None,
    **facts: Any,
) -> Saved:
    """Save flat state as a manager does. `hosts`: host of each rank, to write one file for each.
    `facts`: fields of the manifest."""
    manifest, planner = Manifest({}, {}, **facts), Planner(ranks, hosts)
    pending = begin_save(catalog, name, leaves, planner=planner, facts=manifest)
    return finish_save(pending, ranks)


def save_step(folder: Path, step: int = STEP) -> Path:
    """Save `state()` as a checkpoint of two ranks. Returns its folder."""
    catalog = Catalog(LocalStore(folder))
    catalog.store.make_folder("")

    def work(ranks: Ranks) -> None:
        save_leaves(
            catalog, f"step-{step}", StateTree(state()).flatten(), ranks, step=step, kind="full"
        )

    run_ranks(2, work)
    return folder / f"step-{step}"


def copy_step(path: Path, step: int) -> Path:
    """Copy a checkpoint to the name of another step, with that step in its manifest. Returns the
    copy."""
    copy = Path(shutil.copytree(path, path.with_name(f"step-{step}")))
    index = copy / MANIFEST
    found = manifests.decode(index.read_bytes(), where=str(index))
    index.write_bytes(encode(replace(found, step=step)))
    return copy


def save_stock(folder: Path) -> Path:
    """Save `state()` by stock `torch.distributed.checkpoint`. Returns the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save(state(), checkpoint_id=folder)
    return folder


def save_safetensors(folder: Path) -> Path:
    """Write a Hugging Face folder with two files and an index. Returns it."""
    folder.mkdir(parents=True)
    halves = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(64.0).view(8, 8)},
        "model-00002-of-00002.safetensors": {
            "b": torch.ones(3, dtype=torch.bfloat16),
            "c": torch.arange(5),
            "d": torch.tensor([True, False]),
        },
    }
    for name, tensors in halves.items():
        save_file(tensors, folder / name)
    index = {name: file for file, tensors in halves.items() for name in tensors}
    text = json.dumps({"metadata": {"total_size": 304}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def save_torch(path: Path) -> Path:
    """Save `state()` and a transposed tensor by `torch.save`. Returns the path."""
    torch.save({**state(), "transposed": torch.arange(12.0).view(3, 4).T}, path)
    return path


def flip(data: bytearray, at: int, random: Random) -> None:
    data[at] ^= 1 << random.randrange(8)


def zero(data: bytearray, at: int, random: Random) -> None:
    """Overwrite a few bytes by zeros, or by ones if they are zeros already."""
    stop = min(at + random.randint(1, 16), len(data))
    data[at:stop] = bytes(stop - at) if any(data[at:stop]) else b"\1" * (stop - at)


def truncate(data: bytearray, at: int, random: Random) -> None:
    del data[at:]


def append(data: bytearray, at: int, random: Random) -> None:
    data += random.randbytes(random.randint(1, 20))


def delete(data: bytearray, at: int, random: Random) -> None:
    """Delete a few bytes in the middle, so that the bytes after them move."""
    del data[at : at + random.randint(1, 20)]


DAMAGES: tuple[Callable[[bytearray, int, Random], None], ...] = (
    flip,
    zero,
    truncate,
    append,
    delete,
)
