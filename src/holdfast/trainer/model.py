"""A decoder shaped as Llama 3's or Qwen3's, its weights under Meta's names.

Shapes are part of a tensor's name, one letter per dim:

    B  sequences of a batch          V  vocabulary
    T  tokens of a sequence          F  width inside the feed-forward part
    D  width of the residual stream  E  width of one head
    H  query heads                   K  key and value heads
    P  rotary pairs of a head, E / 2

Under tensor parallelism H, K and F are this rank's share, and between the blocks so is T: nothing
here takes a count of heads or of tokens from anywhere but the tensor at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from holdfast.hf.flavors import Flavor, RopeScaling
from holdfast.trainer.moe import MixtureOfExperts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values to what the queries find."""


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A run of neighbouring blocks, with what stands before the first and after the last of all."""

    layers: range
    """Indices of the blocks in the whole model."""

    num_layers: int
    """Blocks of the whole model."""

    @property
    def first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """Whether it ends with the logits."""
        return self.layers.stop == self.num_layers


@dataclass(frozen=True, slots=True)
class Recompute:
    """What blocks compute again in the backward pass, and keep their input for alone."""

    every: int = 0
    """The last of so many blocks; 0: none."""

    keep_products: bool = False
    """Keep, besides, what products of matrices and attention give: the dear part of a block."""

    def of(self, layer: int) -> Callable[..., Tensor] | None:
        """How a block calls what it computes; None where it keeps everything."""
        if not self.every or (layer + 1) % self.every:
            return None
        kept = partial(create_selective_checkpoint_contexts, _keeps_products)
        contexts = kept if self.keep_products else noop_context_fn
        return partial(checkpoint, use_reentrant=False, context_fn=contexts)


NOTHING = Recompute()


def _keeps_products(_context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
    product = str(op).removeprefix("aten.").partition(".")[0]
    if product in ("mm", "bmm", "addmm", "_grouped_mm") or "dot_product" in product:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """Tokens to the logits of the tokens that follow them; or a part of the way.

    A part that is not the first takes what the part before it gives, of shape BTD.
    """

    rope: Tensor
    """Of shape TP2."""

    def __init__(
        self,
        flavor: Flavor,
        *,
        vocab_size: int,
        seq_len: int,
        recompute: Recompute = NOTHING,
        part: ModelPart | None = None,
        positions: range | None = None,
    ) -> None:
        """`part`: these blocks only; `positions`: of the tokens that it is given, if not all."""
        super().__init__()
        self.flavor = flavor
        self.seq_len = seq_len
        self.part: ModelPart = part or ModelPart(range(flavor.num_layers), flavor.num_layers)
        self.positions: range = positions or range(seq_len)
        self.tok_embeddings: nn.Module = nn.Identity()
        if self.part.first:
            self.tok_embeddings = nn.Embedding(vocab_size, flavor.dim)
        # Keyed by the index in the whole model, so that a pipeline stage, which holds a few of the
        # blocks, names its weights as the whole model does.
        self.layers: nn.ModuleDict = nn.ModuleDict(
            {str(i): TransformerBlock(flavor, recompute.of(i)) for i in self.part.layers}
        )
        self.norm: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        if self.part.last:
            self.norm = RMSNorm(flavor.dim, flavor.norm_eps)
            self.output = nn.Linear(flavor.dim, vocab_size, bias=False)
        # Follows from the configuration: no checkpoint needs it.
        self.register_buffer("rope", self.rope_table(), persistent=False)
        self.tie()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits, of shape BTV; of a part that is not the last, what goes on to the next one."""
        x_BTD = self.tok_embeddings(tokens_BT)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, self.rope)
        logits_BTV: Tensor = self.output(self.norm(x_BTD))
        return logits_BTV

    def tie(self) -> None:
        """Make `output` and `tok_embeddings` one parameter again, where the flavor has it so.

        Whatever gives modules new parameters one by one (sharding, leaving the meta device) parts
        the two.
        """
        if self.flavor.tied:
            self.output.weight = self.tok_embeddings.weight

    def rope_table(self) -> Tensor:
        """Cosine and sine of each position's angle, by rotary pair, on the current device."""
        table_TP2 = rotary_table(
            self.seq_len, self.flavor.head_dim, self.flavor.rope_theta, self.flavor.rope_scaling
        )
        return table_TP2[self.positions.start : self.positions.stop]


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to what came in."""

    def __init__(self, flavor: Flavor, recompute: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm: RMSNorm = RMSNorm(flavor.dim, flavor.norm_eps)
        self.attention: Attention = Attention(flavor)
        self.ffn_norm: RMSNorm = RMSNorm(flavor.dim, flavor.norm_eps)
        if flavor.experts is None:
            self.feed_forward: FeedForward = FeedForward(flavor)
        else:
            self.moe: MixtureOfExperts = MixtureOfExperts(flavor.dim, flavor.experts)

    def forward(self, x_BTD: Tensor, rope_TP2: Tensor) -> Tensor:
        # Inside the block, so that names and FSDP's hooks, which go around it, stay as they are.
        if self.recompute is not None and self.training:
            return self.recompute(self.compute, x_BTD, rope_TP2)
        return self.compute(x_BTD, rope_TP2)

    def compute(self, x_BTD: Tensor, rope_TP2: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_TP2)
        widened = self.feed_forward if hasattr(self, "feed_forward") else self.moe
        out_BTD: Tensor = x_BTD + widened(self.ffn_norm(x_BTD))
        return out_BTD


class Attention(nn.Module):
    """Causal attention, several query heads to each key and value head."""

    attend: Attend
    """Context parallelism puts its own in the place of `attend`."""

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
    """Causal attention, of shape BHTE."""
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=True)


class FeedForward(nn.Module):
    """SwiGLU: a gated layer up to F and a layer back."""

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
    """Each vector divided by its root mean square, then scaled by learned weights."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight: nn.Parameter = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # In float32: squares of bfloat16 lose all but two digits.
        full_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(full_BTD.pow(2).mean(-1, keepdim=True) + self.eps)
        return (full_BTD * scale_BT1).type_as(x_BTD) * self.weight


def rotary_table(seq_len: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Cosine and sine of `position * frequency`, by position and rotary pair."""
    frequency_P = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is not None:
        frequency_P = _stretched(frequency_P, scaling)
    angle_TP = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequency_P)
    return torch.stack((angle_TP.cos(), angle_TP.sin()), dim=-1)


def _stretched(frequency_P: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequencies: low ones divided by `factor`, high ones kept, a ramp between."""
    turns_P = frequency_P * scaling.original_seq_len / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


def rotate(x_BTHE: Tensor, rope_TP2: Tensor) -> Tensor:
    """Each head's pairs of neighbours turned by the angle of their position.

    Neighbours (0, 1), (2, 3), ...: the order in which Meta's weights come. Hugging Face's copies
    pair the first half with the second and have their rows of `wq` and `wk` permuted to match.
    """
    even_BTHP, odd_BTHP = x_BTHE.float().reshape(*x_BTHE.shape[:-1], -1, 2).unbind(-1)
    turned = _turned(even_BTHP, odd_BTHP, rope_TP2)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x_BTHE)


def rotate_halves(x_BTHE: Tensor, rope_TP2: Tensor) -> Tensor:
    """Each head's first half turned with its second by the angle of their position."""
    first_BTHP, second_BTHP = x_BTHE.float().chunk(2, dim=-1)
    return torch.cat(_turned(first_BTHP, second_BTHP, rope_TP2), dim=-1).type_as(x_BTHE)


def _turned(one_BTHP: Tensor, other_BTHP: Tensor, rope_TP2: Tensor) -> tuple[Tensor, Tensor]:
    rope_T1P2 = rope_TP2[: one_BTHP.shape[1]].unsqueeze(1)
    cos_T1P, sin_T1P = rope_T1P2.unbind(-1)
    return (
        one_BTHP * cos_T1P - other_BTHP * sin_T1P,
        one_BTHP * sin_T1P + other_BTHP * cos_T1P,
    )
