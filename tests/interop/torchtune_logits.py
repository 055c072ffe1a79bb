"""Compute the logits of a small Llama, loaded by each checkpointer of torchtune 0.6.1.

Runs in an environment with torchtune. Argument: a folder with `step` (a model-only checkpoint with
Meta's names), `model.pt` (converted from it) and `hf` (an export). Writes `logits.pt` there."""

import sys
from pathlib import Path

import torch
from torchtune.models import convert_weights
from torchtune.models.llama3 import llama3
from torchtune.training.checkpointing import (
    DistributedCheckpointer,
    FullModelHFCheckpointer,
    FullModelMetaCheckpointer,
)

folder = Path(sys.argv[1])
given = torch.load(folder / "given.pt", weights_only=True)
sizes = given["sizes"]
output = folder.with_name(f"{folder.name}-torchtune")


def logits(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a new model with these weights."""
    model = llama3(**sizes)
    model.load_state_dict(state)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(given["tokens"])
    return found


meta = FullModelMetaCheckpointer(
    checkpoint_dir=str(folder),
    checkpoint_files=["model.pt"],
    model_type="LLAMA3",
    output_dir=str(output / "meta"),
)
hf = FullModelHFCheckpointer(
    checkpoint_dir=str(folder / "hf"),
    checkpoint_files=["model.safetensors"],
    model_type="LLAMA3",
    output_dir=str(output / "hf"),
)
(output / "distributed").mkdir(parents=True)
distributed = DistributedCheckpointer(str(folder), str(output / "distributed"))
empty = {name: torch.zeros(shape) for name, shape in given["shapes"].items()}
read = distributed.load_checkpoint(empty, str(folder / "step"))
torch.save(
    {
        "FullModelMetaCheckpointer": logits(meta.load_checkpoint()["model"]),
        "FullModelHFCheckpointer": logits(hf.load_checkpoint()["model"]),
        "DistributedCheckpointer": logits(convert_weights.meta_to_tune(read)),
    },
    folder / "logits.pt",
)
