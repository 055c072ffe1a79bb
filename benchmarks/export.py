"""Export of a Hugging Face folder by 4 ranks.

    torchrun --nproc-per-node 4 -m benchmarks.export --where DIR

Each system exports a sharded model of 1.9 GB with the shapes of a Llama. Holdfast syncs and
publishes the folder. torch's `HuggingFaceStorageWriter`, with consolidation, syncs nothing, and
converts neither names nor row order. There are three rounds of each in turn. Times are those of
rank 0, between barriers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from holdfast.catalog.catalog import Catalog
from holdfast.comm import all_ranks
from holdfast.hf.export import ExportSnapshot, HFModel, export
from holdfast.hf.flavors import LLAMA3, config_of
from holdfast.saving.planner import Planner
from holdfast.saving.save import begin_save
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

ROUNDS = 3
FLAVOR = replace(LLAMA3["1B"], tied=False, num_layers=11)
VOCAB = 64128


def sharded_model() -> dict[str, torch.Tensor]:
    """Make random bfloat16 weights under Meta's names, sharded by rows over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mapping = HFModel(config_of("llama3", FLAVOR, VOCAB)).mapping
    state: dict[str, torch.Tensor] = {}
    for name in mapping.names("native"):
        rows, *rest = mapping.shape("native", name)
        local = torch.randn(rows // dist.get_world_size(), *rest, dtype=torch.bfloat16)
        state[name] = DTensor.from_local(local, mesh, [Shard(0)])
    return state


def export_holdfast(state: dict[str, torch.Tensor], folder: Path) -> Callable[[int], None]:
    """Return a function that exports with Holdfast."""
    ranks, model = all_ranks(), HFModel(config_of("llama3", FLAVOR, VOCAB))
    catalog, planner = Catalog(LocalStore(folder)), Planner(ranks)

    def run(number: int) -> None:
        pending = begin_save(catalog, f"step-{number}", StateTree(state).flatten(), planner=planner)
        snapshot = ExportSnapshot(pending.file_layout, pending.data_of, pending.index, ())
        export(snapshot, model, "bfloat16", catalog=catalog, attempt=pending.attempt, ranks=ranks)

    return run


def export_torch(state: dict[str, torch.Tensor], folder: Path) -> Callable[[int], None]:
    """Return a function that exports with torch."""

    def run(number: int) -> None:
        writer = HuggingFaceStorageWriter(
            path=str(folder / f"step-{number}"),
            save_distributed=True,
            enable_consolidation=True,
            fqn_to_index_mapping=dict.fromkeys(state, 1),
        )
        save(state, storage_writer=writer)

    return run


def main() -> None:
    """Measure, and print a table row for each system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--where", type=Path, required=True, help="a folder with room for 3 models")
    where = parser.parse_args().where
    dist.init_process_group("gloo")
    state = sharded_model()
    exports = {}
    for name, make in (("Holdfast", export_holdfast), ("torch", export_torch)):
        (where / name).mkdir(parents=True, exist_ok=True)
        exports[name] = make(state, where / name)
    seconds: dict[str, list[float]] = {name: [] for name in exports}
    for number in range(ROUNDS):
        for name, run in exports.items():
            dist.barrier()
            if dist.get_rank() == 0:
                os.sync()
            dist.barrier()
            started = time.perf_counter()
            run(number)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
            if dist.get_rank() == 0:
                shutil.rmtree(where / name / f"step-{number}")
    if dist.get_rank() == 0:
        for name, values in seconds.items():
            rounds = ", ".join(f"{value:.2f}" for value in values)
            sys.stdout.write(f"| {name} | {statistics.median(values):.2f} s | {rounds} |\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
