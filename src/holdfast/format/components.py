"""Names of the components of a training state, as TorchTitan names them.

Each name is the first key of the component's paths, except for the model.
"""

from __future__ import annotations

MODEL = "model"
OPTIMIZER = "optimizer"
SCHEDULER = "lr_scheduler"
DATALOADER = "dataloader"
TRAIN_STATE = "train_state"
RNG = "rng"

COMPONENTS = (OPTIMIZER, SCHEDULER, DATALOADER, TRAIN_STATE, RNG)
"""All components but the model. The paths of the model's tensors have no common first key."""

DATALOADER_KEYS = (DATALOADER, "data_loader")
"""Keys under which TorchTitan's users store the state of a data loader."""

MODEL_KEYS = (MODEL, "state_dict", "model_state_dict", "module")
"""Keys under which other programs store a whole model: Accelerate and torchtune (`model`),
Lightning (`state_dict`), torch's tutorials (`model_state_dict`), DeepSpeed (`module`)."""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts that torch.compile, activation checkpointing and FSDP insert into parameter names."""

OUTER_WRAPPER = "module"
"""Part that DDP and other wrappers put before all parameter names of a model. Elsewhere in a name,
it may be a module of the model itself."""
