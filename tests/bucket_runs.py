"""Checkpoints in a bucket in memory: what a process does with one, and what is there afterwards."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from buckets import ModelBucket
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.open_any import Opened, open_in
from holdfast.catalog.source import Source
from holdfast.comm import Solo
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.loading.opening import read_on_all
from holdfast.saving.save import Saved, save_in
from holdfast.state.objects import StateTree
from holdfast.storage import bucket as requests_of_bucket
from holdfast.storage.objects import ObjectStore
from holdfast.storage.store import Store

NAME = "step-5"

OLD, NEW = 1, 2


@contextmanager
def quiet() -> Iterator[None]:
    """Turn logging and pauses off: thousands of runs would log and wait."""
    pause_s, requests_of_bucket.PAUSE_S = requests_of_bucket.PAUSE_S, 0.0
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        requests_of_bucket.PAUSE_S = pause_s
        logging.disable(logging.NOTSET)


def state_of(value: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50,), float(value))}, "value": value}


def save(value: int, store: Store, *, overwrite: bool = False) -> Saved:
    """Save as `holdfast.save` does."""
    return save_in(Catalog(store), NAME, state_of(value), ranks=Solo(), overwrite=overwrite)


def load(store: Store) -> int:
    """Load as `holdfast.load` does. Fails on a mix of two checkpoints."""
    state = state_of(0)

    def read(opened: Opened) -> int:
        load_tree(opened.source(store), StateTree(state), ranks=Solo())
        value: int = state["value"]
        assert torch.equal(state["model"]["w"], torch.full((50,), float(value))), "a mix"
        return value

    return read_on_all(Solo(), store, lambda: open_in(store, NAME), read)


def delete(store: Store) -> None:
    """Delete as retention does."""
    store.remove(Catalog(store).set_aside_for_deletion(NAME))


def clean_up(store: Store) -> list[str]:
    """Clean up as a start does."""
    return execute(store, plan_cleanup(store.list()))


def store_in(bucket: ModelBucket, fail: Any = lambda *_: None) -> ObjectStore:
    """A process's view of the bucket. Requests are sent one at a time, so that their order is the
    same each time."""
    return ObjectStore(bucket.client(fail), threads=1)


def held_in(bucket: ModelBucket) -> int | None:
    """Value of the state in the checkpoint; None if there is none. Every byte is read."""
    store = store_in(bucket)
    if f"{NAME}/" not in store.list():
        return None
    checkpoint = Checkpoint(Source(store, NAME, open_manifest(store, NAME)))
    value: int = checkpoint.value("value")
    assert torch.equal(checkpoint.read("model.w"), torch.full((50,), float(value))), "a mix"
    return value


def stock_reads(bucket: ModelBucket, folder: Path) -> int:
    """Download the checkpoint, and load it by stock DCP."""
    shutil.rmtree(folder, ignore_errors=True)
    for key, data in bucket.contents().items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    state = {"model": {"w": torch.zeros(50)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Stock DCP warns about a single process.
        stock_load(state, storage_reader=FileSystemReader(folder / NAME), no_dist=True)
    (value,) = torch.unique(state["model"]["w"]).tolist()
    return int(value)


def left_by_a_killed_save(store: ObjectStore) -> None:
    save(OLD, store)
    for key in (f"{NAME}/0badcafe/__0_0.distcp", f"{NAME}/0badcafe/manifest.json"):
        store._bucket.put(key, b"half")
