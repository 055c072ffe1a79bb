"""Compute the logits of TorchTitan 0.3.0's models, each loaded from a checkpoint by stock DCP.

Runs in an environment with TorchTitan. Argument: a folder with one folder per model, which has
`given.pt` and `step-0`. Writes `logits.pt` into each.

On a CPU three parts of TorchTitan are replaced. `flex_attention` runs uncompiled, since TorchTitan
compiles it with options for GPUs. `torch._grouped_mm` becomes a loop over the experts. Experts are
computed in float32, where TorchTitan always uses bfloat16.
"""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as stock
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.moe import TokenChoiceTopKRouter

FlexAttention._compiled_flex_attn = flex_attention
Tensor.bfloat16 = Tensor.float  # type: ignore[method-assign]
chosen: list[Any] = []


def expert_by_expert(rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """Compute `torch._grouped_mm`: rows up to each offset, times the weights of one expert."""
    made = rows.new_zeros(rows.shape[0], weights.shape[-1])
    start = 0
    for expert, stop in enumerate(offs.tolist()):
        made[start:stop] = rows[start:stop] @ weights[expert]
        start = stop
    return made


torch._grouped_mm = expert_by_expert  # type: ignore[assignment]


def build(name: str, flavor: str, sizes: dict[str, Any]) -> torch.nn.Module:
    """Build a model of two blocks. `sizes`: smaller sizes in place of the flavor's."""
    models = import_module(f"torchtitan.models.{name}")
    sparse = name in ("deepseek_v3", "gpt_oss") or "moe" in flavor
    experts = {"moe_comm_backend": "standard"} if sparse else {}
    config = models.model_registry(flavor, attn_backend="flex", **experts).model
    layers = config.layers[:2]
    if sizes:
        rope = layers[0].attention.rope
        layers = models._build_dsv3_layers(**sizes, rope=rope, attn_backend="flex", **experts)
    model: torch.nn.Module = replace(config, layers=layers).build().eval()
    for module in model.modules():
        if isinstance(module, TokenChoiceTopKRouter):
            module.register_forward_hook(lambda *call: chosen.append(call[-1][1]))
    return model


for folder in sorted(Path(sys.argv[1]).iterdir()):
    given = torch.load(folder / "given.pt", weights_only=True)
    chosen.clear()
    model = build(given["name"], given["flavor"], given["sizes"])
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = given["eps"]
    state = {name: torch.full_like(tensor, 7) for name, tensor in model.state_dict().items()}
    stock.load(state, checkpoint_id=str(folder / "step-0"))
    model.load_state_dict(state, strict=True)
    tokens = given["tokens"]
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    masks = model.get_attention_masks(positions)  # type: ignore[operator]
    with torch.no_grad():
        logits = model(tokens, positions=positions, attention_masks=masks)
    experts = [ids.sort(-1).values for ids in chosen]
    torch.save({"logits": logits, "experts": experts}, folder / "logits.pt")
