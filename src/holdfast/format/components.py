"""Names of the components of a training state, as in TorchTitan: first keys of their paths."""

from __future__ import annotations

MODEL = "model"
OPTIMIZER = "optimizer"
SCHEDULER = "lr_scheduler"
DATALOADER = "dataloader"
TRAIN_STATE = "train_state"
RNG = "rng"

COMPONENTS = (OPTIMIZER, SCHEDULER, DATALOADER, TRAIN_STATE, RNG)
"""All components but the model: the paths of its tensors have no common first key."""

DATALOADER_KEYS = (DATALOADER, "data_loader")
"""First keys of the state of a data loader: TorchTitan's users write either."""

MODEL_KEYS = (MODEL, "state_dict", "model_state_dict", "module")
"""First keys of a whole model in files of Accelerate and torchtune (`model`), of Lightning, of
torch's tutorials, and of DeepSpeed (`module`)."""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts of parameter names that torch.compile, activation checkpointing and FSDP add."""

OUTER_WRAPPER = "module"
"""Part that DDP and others add around the whole model. Inside a model, it may be a name."""
