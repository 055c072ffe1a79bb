"""Names of the components of a training state, as in TorchTitan: first keys of their paths."""

from __future__ import annotations

MODEL = "model"
OPTIMIZER = "optimizer"
SCHEDULER = "lr_scheduler"
DATALOADER = "dataloader"
TRAIN_STATE = "train_state"
RNG = "rng"

COMPONENTS = (OPTIMIZER, SCHEDULER, DATALOADER, TRAIN_STATE, RNG)
"""All but the model, whose tensors have no common first key."""

DATALOADER_KEYS = (DATALOADER, "data_loader")
"""Both spellings are in use among TorchTitan's users, for one component."""

MODEL_KEYS = (MODEL, "state_dict")
"""First keys of a whole model in the files of others: Accelerate and torchtune; Lightning."""
