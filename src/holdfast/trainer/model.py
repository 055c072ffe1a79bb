"""Decoder with the architecture of Llama 3 or Qwen3, and Meta's names for its weights.

A tensor's name ends in its shape, one letter per dim:

    B  sequences in a batch          V  vocabulary size
    T  tokens in a sequence          F  hidden width of the feed-forward layer
    D  width of the residual stream  E  width of one head
    H  query heads                   K  key and value heads
    P  rotary pairs of a head, E / 2

With tensor parallelism, H, K and F count only this rank's share. Between the layers, T does too.
Therefore the code takes all these counts from its tensors, never from the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from holdfast.hf.flavors import Flavor
from holdfast.hf.rope import DynamicScaling, LinearScaling, Llama3Scaling, Scaling, YarnScaling
from holdfast.trainer.config import ActivationCheckpointConfig
from holdfast.trainer.moe import MixtureOfExperts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function that computes attention from queries (BHTE), keys and values (BKTE); returns BHTE."""


def checkpoint_function(
    config: ActivationCheckpointConfig, layer: int
) -> Callable[..., Tensor] | None:
    """Return a function that runs the layer with index `layer` with activation checkpointing; None
    if `config` selects none for this layer."""
    selective = config.mode == "selective"
    if selective and config.selective_ac_option == "op":
        # Matrix products and attention, the costly part of a layer, are not recomputed.
        contexts = partial(create_selective_checkpoint_contexts, _product_policy)
        return partial(checkpoint, use_reentrant=False, context_fn=contexts)
    interval = int(config.selective_ac_option) if selective else 1
    if config.mode == "none" or (layer + 1) % interval:
        return None
    return partial(checkpoint, use_reentrant=False)


def _product_policy(_context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
    product = str(op).removeprefix("aten.").partition(".")[0]
    if product in ("mm", "bmm", "addmm", "_grouped_mm") or "dot_product" in product:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """Decoder, or one pipeline stage of it.

    The first stage takes tokens. Each later stage takes the hidden states of the stage before it.
    """

    rope: Tensor
    """Cosine and sine for each position and each rotary pair of a head: see `rotary_table`."""

    def __init__(
        self,
        flavor: Flavor,
        *,
        vocab_size: int,
        seq_len: int,
        recompute: ActivationCheckpointConfig | None = None,
        layers: range | None = None,
        positions: range | None = None,
    ) -> None:
        """Build the stage of `layers` (default: all) for tokens at `positions` (default: all).

        The stage with the first layer has the embedding, the stage with the last layer the output.
        """
        super().__init__()
        self.flavor = flavor
        self.seq_len = seq_len
        layers = layers or range(flavor.num_layers)
        self.first: bool = layers.start == 0
        self.last: bool = layers.stop == flavor.num_layers
        self.positions: range = positions or range(seq_len)
        recompute = recompute or ActivationCheckpointConfig()
        self.tok_embeddings: nn.Module = nn.Identity()
        if self.first:
            self.tok_embeddings = nn.Embedding(vocab_size, flavor.dim)
        # Keyed by the index in the whole model, so that a pipeline stage names its weights as the
        # whole model does.
        self.layers: nn.ModuleDict = nn.ModuleDict(
            {
                str(index): TransformerBlock(flavor, checkpoint_function(recompute, index))
                for index in layers
            }
        )
        self.norm: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        if self.last:
            self.norm = RMSNorm(flavor.dim, flavor.norm_eps)
            self.output = nn.Linear(flavor.dim, vocab_size, bias=False)
        # Not persistent, since it can be computed from the configuration.
        self.register_buffer("rope", self.rope_table(), persistent=False)
        self.tie()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits; in a stage before the last, the hidden states."""
        x_BTD = self.tok_embeddings(tokens_BT)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, self.rope)
        logits_BTV: Tensor = self.output(self.norm(x_BTD))
        return logits_BTV

    def tie(self) -> None:
        """Make `output` and `tok_embeddings` share one parameter if the flavor ties them.

        Call again after sharding and after leaving the meta device: both replace the shared
        parameter by two.
        """
        if self.flavor.tied:
            self.output.weight = self.tok_embeddings.weight

    def rope_table(self) -> Tensor:
        """Compute the rotary table for `positions` on the current device: see `rotary_table`."""
        table_TP2 = rotary_table(
            self.seq_len, self.flavor.head_dim, self.flavor.rope_theta, self.flavor.rope_scaling
        )
        return table_TP2[self.positions.start : self.positions.stop]


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each with a residual connection."""

    def __init__(self, flavor: Flavor, checkpointed: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.attention_norm: RMSNorm = RMSNorm(flavor.dim, flavor.norm_eps)
        self.attention: Attention = Attention(flavor)
        self.ffn_norm: RMSNorm = RMSNorm(flavor.dim, flavor.norm_eps)
        if flavor.experts is None:
            self.feed_forward: FeedForward = FeedForward(flavor)
        else:
            self.moe: MixtureOfExperts = MixtureOfExperts(flavor.dim, flavor.experts)

    def forward(self, x_BTD: Tensor, rope_TP2: Tensor) -> Tensor:
        # Not torch's wrapper module for this, which would change the names of the weights and wrap
        # FSDP's hooks.
        if self.checkpointed is not None and self.training:
            return self.checkpointed(self.compute, x_BTD, rope_TP2)
        return self.compute(x_BTD, rope_TP2)

    def compute(self, x_BTD: Tensor, rope_TP2: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TP2)
        feed_forward = self.feed_forward if hasattr(self, "feed_forward") else self.moe
        out_BTD: Tensor = x_BTD + feed_forward(self.ffn_norm(x_BTD))
        return out_BTD


class Attention(nn.Module):
    """Causal attention with grouped queries."""

    attend: Attend
    """Attention kernel; context parallelism replaces it."""

    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.attend = attend
        self.head_dim: int = flavor.head_dim
        self.rotate: Callable[[Tensor, Tensor], Tensor] = (
            rotate_halves if flavor.rope_halves else rotate
        )
        query_dim = flavor.num_heads * flavor.head_dim
        kv_dim = flavor.num_kv_heads * flavor.head_dim
        self.wq: nn.Linear = nn.Linear(flavor.dim, query_dim, bias=False)
        self.wk: nn.Linear = nn.Linear(flavor.dim, kv_dim, bias=False)
        self.wv: nn.Linear = nn.Linear(flavor.dim, kv_dim, bias=False)
        self.wo: nn.Linear = nn.Linear(query_dim, flavor.dim, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if flavor.head_norm:
            self.q_norm = RMSNorm(flavor.head_dim, flavor.norm_eps)
            self.k_norm = RMSNorm(flavor.head_dim, flavor.norm_eps)

    def forward(self, x_BTD: Tensor, rope_TP2: Tensor) -> Tensor:
        q_BTHE = self.wq(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKE = self.wk(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKE = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHE = self.rotate(self.q_norm(q_BTHE), rope_TP2)
        k_BTKE = self.rotate(self.k_norm(k_BTKE), rope_TP2)
        out_BHTE = self.attend(
            q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        )
        out_BTD: Tensor = self.wo(out_BHTE.transpose(1, 2).flatten(2))
        return out_BTD


def attend(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Compute causal attention. The output has the shape of the queries."""
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=True)


class FeedForward(nn.Module):
    """SwiGLU: a gated projection to the hidden width and a projection back."""

    def __init__(self, flavor: Flavor) -> None:
        super().__init__()
        self.w1: nn.Linear = nn.Linear(flavor.dim, flavor.hidden_dim, bias=False)
        self.w2: nn.Linear = nn.Linear(flavor.hidden_dim, flavor.dim, bias=False)
        self.w3: nn.Linear = nn.Linear(flavor.dim, flavor.hidden_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden_BTF = F.silu(self.w1(x_BTD)) * self.w3(x_BTD)
        out_BTD: Tensor = self.w2(hidden_BTF)
        return out_BTD


class RMSNorm(nn.Module):
    """Division of each vector by its root mean square, then a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # In float32: squares in bfloat16 keep only two digits.
        full_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(full_BTD.pow(2).mean(-1, keepdim=True) + self.eps)
        return (full_BTD * scale_BT1).type_as(x_BTD) * self.weight


def rotary_table(seq_len: int, head_dim: int, theta: float, scaling: Scaling | None) -> Tensor:
    """Compute cosine and sine of `position * frequency` for each position and each rotary pair of a
    head, as transformers does. Shape: `(seq_len, head_dim / 2, 2)`.

    With `DynamicScaling`, the frequencies depend on `seq_len`. Shorter sequences use the same
    frequencies.
    """
    if isinstance(scaling, DynamicScaling):
        length = max(seq_len, scaling.original_seq_len) / scaling.original_seq_len
        growth = scaling.factor * length - (scaling.factor - 1)
        theta *= growth ** (head_dim / (head_dim - 2))
    frequency_P = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match scaling:
        case Llama3Scaling():
            frequency_P = _scale_frequencies(frequency_P, scaling)
        case LinearScaling():
            frequency_P = frequency_P / scaling.factor
        case YarnScaling():
            kept_P = _kept_by_yarn(head_dim, theta, scaling)
            frequency_P = frequency_P * (kept_P + (1 - kept_P) / scaling.factor)
    angle_TP = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency_P)
    table_TP2 = torch.stack((angle_TP.cos(), angle_TP.sin()), dim=-1)
    return table_TP2 * scaling.attention_factor if isinstance(scaling, YarnScaling) else table_TP2


def _scale_frequencies(frequency_P: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Scale rotary frequencies as Llama 3.1 does: divide low frequencies by `factor`, keep high
    frequencies, and interpolate between the two."""
    turns_P = frequency_P * scaling.original_seq_len / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


def _kept_by_yarn(head_dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """Return the share of each rotary frequency that YaRN does not scale: 1 for high frequencies, 0
    for low frequencies, a ramp between the two."""

    def index_of(num_turns: float) -> float:
        turns_per_radian = scaling.original_seq_len / (num_turns * 2 * math.pi)
        return head_dim * math.log(turns_per_radian) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp_P = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1 - ramp_P.clamp(0, 1)


def rotate(x_BTHE: Tensor, rope_TP2: Tensor) -> Tensor:
    """Rotate each head's pairs of neighbouring elements by the angles in the rotary table.

    The pairs are (0, 1), (2, 3), ..., as in Meta's weights. Hugging Face's copies of these weights
    pair the first half with the second, and permute the rows of `wq` and `wk` to match.
    """
    even_BTHP, odd_BTHP = x_BTHE.float().reshape(*x_BTHE.shape[:-1], -1, 2).unbind(-1)
    rotated = _rotate_pairs(even_BTHP, odd_BTHP, rope_TP2)
    return torch.stack(rotated, dim=-1).flatten(-2).type_as(x_BTHE)


def rotate_halves(x_BTHE: Tensor, rope_TP2: Tensor) -> Tensor:
    """Rotate pairs of elements, one of each half of a head, by the angles in the rotary table."""
    first_BTHP, second_BTHP = x_BTHE.float().chunk(2, dim=-1)
    rotated = _rotate_pairs(first_BTHP, second_BTHP, rope_TP2)
    return torch.cat(rotated, dim=-1).type_as(x_BTHE)


def _rotate_pairs(x_BTHP: Tensor, y_BTHP: Tensor, rope_TP2: Tensor) -> tuple[Tensor, Tensor]:
    cos_T1P, sin_T1P = rope_TP2[: x_BTHP.shape[1]].unsqueeze(1).unbind(-1)
    return x_BTHP * cos_T1P - y_BTHP * sin_T1P, x_BTHP * sin_T1P + y_BTHP * cos_T1P
