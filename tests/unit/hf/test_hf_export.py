"""Export of a live model in bounded memory."""

from __future__ import annotations

from pathlib import Path

from memory import extra_mib

LIMIT_MIB = 64

PREPARED = """
from dataclasses import replace
import torch
from holdfast.catalog.catalog import Catalog
from holdfast.saving.planner import Planner
from holdfast.comm import Solo
from holdfast.saving.save import begin_save
from holdfast.hf.export import ExportSnapshot, HFModel, export
from holdfast.hf.flavors import MODELS, config_of
from holdfast.state.objects import StateTree
from holdfast.storage.local import LocalStore

def model(vocab_size):
    flavor = replace(MODELS["llama3"]["debugmodel"], dim=64, num_layers=1, hidden_dim=96)
    hf_model = HFModel(config_of("llama3", flavor, vocab_size))
    mapping = hf_model.mapping
    shapes = {name: mapping.shape("native", name) for name in mapping.names("native")}
    # Transposed, so that no matrix is contiguous in memory, as the export needs it.
    return hf_model, {name: torch.ones(shape[::-1]).T for name, shape in shapes.items()}

def write(name, hf_model, state):
    catalog, ranks = Catalog(LocalStore(sys.argv[1])), Solo()
    leaves = StateTree(state).flatten()
    begun = begin_save(catalog, name, leaves, planner=Planner(ranks))
    snapshot = ExportSnapshot(begun.file_layout, begun.data_of, begun.index, ())
    export(snapshot, hf_model, "bfloat16", catalog=catalog, attempt=begun.attempt, ranks=ranks)

write("step-1", *model(1000))
large = model(1_000_000)
"""

MEASURED = """
write("step-2", *large)
"""


def test_an_export_makes_no_copy_of_a_whole_tensor(tmp_path: Path) -> None:
    """G13: the export of matrices of 244 MiB, transposed and cast, uses at most 64 MiB of memory.
    Method: peak resident memory of a separate process."""
    assert extra_mib(PREPARED, MEASURED, tmp_path) < LIMIT_MIB
