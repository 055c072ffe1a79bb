"""A feed-forward part of many experts, a few of which see each token: Qwen3's.

Shapes are part of a tensor's name, as in `model`; beside its letters:

    N  tokens, of all sequences       X  experts
    C  experts that see a token       R  rows to compute: N x C, or what other ranks have sent

There is no loss that balances the experts: it would depend on which tokens share a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from holdfast.hf.flavors import ExpertFlavor


class MixtureOfExperts(nn.Module):
    """Each token's experts, weighted by how strongly the router chose them."""

    def __init__(self, dim: int, flavor: ExpertFlavor) -> None:
        super().__init__()
        self.router: Router = Router(dim, flavor)
        self.experts: Experts = Experts(dim, flavor)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weight_NC, expert_NC = self.router(x_ND)
        # Rows in the order of their experts; among those of one expert, of the tokens.
        order_R = expert_NC.flatten().argsort(stable=True)
        count_X = torch.bincount(expert_NC.flatten(), minlength=self.experts.num_experts)
        out_RD = self.experts(x_ND[order_R // expert_NC.shape[1]], count_X)
        # Back to the order of the tokens by reading, not by adding to: no order is left to chance.
        out_NCD = out_RD[order_R.argsort()].unflatten(0, expert_NC.shape)
        out_ND: Tensor = (out_NCD * weight_NC.unsqueeze(-1).type_as(out_NCD)).sum(1)
        return out_ND.view_as(x_BTD)


class Router(nn.Module):
    """Which experts see a token, and with what weight; the weights of a token add up to 1."""

    def __init__(self, dim: int, flavor: ExpertFlavor) -> None:
        super().__init__()
        self.num_active: int = flavor.num_active
        self.gate: nn.Linear = nn.Linear(dim, flavor.num_experts, bias=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        share_NX = self.gate(x_ND).float().softmax(-1)
        weight_NC, expert_NC = share_NX.topk(self.num_active, dim=-1)
        return weight_NC / weight_NC.sum(-1, keepdim=True), expert_NC


class Experts(nn.Module):
    """All experts: each a SwiGLU of its own, its matrices a slice of `w1`, `w2` and `w3`."""

    def __init__(self, dim: int, flavor: ExpertFlavor) -> None:
        super().__init__()
        self.num_experts: int = flavor.num_experts
        self.group: dist.ProcessGroup | None = None
        hidden = flavor.hidden_dim
        self.w1: nn.Parameter = nn.Parameter(torch.empty(flavor.num_experts, hidden, dim))
        self.w2: nn.Parameter = nn.Parameter(torch.empty(flavor.num_experts, dim, hidden))
        self.w3: nn.Parameter = nn.Parameter(torch.empty(flavor.num_experts, hidden, dim))

    @property
    def num_local(self) -> int:
        """How many of the experts this rank has, or shares with others."""
        return self.num_experts // (1 if self.group is None else self.group.size())

    def share(self, mesh: DeviceMesh) -> None:
        """Expert parallel: each rank of `mesh` keeps as many experts, and tokens travel to them."""
        self.group = mesh.get_group()
        for name, weight in list(self.named_parameters()):
            shared = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            setattr(self, name, nn.Parameter(shared))

    def forward(self, x_RD: Tensor, count_X: Tensor) -> Tensor:
        """What each row's expert makes of it. `x_RD` holds the rows of expert 0 first, `count_X`
        of them, and so on. Collective over the ranks that share the experts, forward and back."""
        if self.group is None:
            return self._compute(x_RD, count_X.tolist())
        num_ranks = self.group.size()
        sent_PX = count_X.view(num_ranks, -1)
        received_PX = torch.empty_like(sent_PX)
        dist.all_to_all_single(received_PX, sent_PX.contiguous(), group=self.group)
        sent, received = sent_PX.sum(1).tolist(), received_PX.sum(1).tolist()
        # Rank by rank as they come, expert by expert as they are computed.
        arrived_RD = _exchanged(x_RD, sent, received, self.group)
        blocks = torch.split(arrived_RD, received_PX.flatten().tolist())
        num_local = received_PX.shape[1]
        sorted_RD = torch.cat([b for e in range(num_local) for b in blocks[e::num_local]])
        out_RD = self._compute(sorted_RD, received_PX.sum(0).tolist())
        parts = torch.split(out_RD, received_PX.t().flatten().tolist())
        returned_RD = torch.cat([p for rank in range(num_ranks) for p in parts[rank::num_ranks]])
        return _exchanged(returned_RD, received, sent, self.group)

    def _compute(self, x_RD: Tensor, counts: list[int]) -> Tensor:
        w1, w2, w3 = (_local(weight) for weight in (self.w1, self.w2, self.w3))
        return torch.cat(
            [
                F.linear(F.silu(F.linear(x, w1[e])) * F.linear(x, w3[e]), w2[e])
                for e, x in enumerate(torch.split(x_RD, counts))
            ]
        )


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _exchanged(
    x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_RD: Tensor = _Exchange.apply(x_RD, sent, received, group)  # type: ignore[no-untyped-call]
    return out_RD


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, rows from other ranks; gradients go the way back."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x_RD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(
    x_RD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    # Both contiguous: gradients need not be, and `all_to_all_single` is wrong without a word then.
    out_RD = x_RD.new_empty(sum(received), x_RD.shape[1])
    dist.all_to_all_single(out_RD, x_RD.contiguous(), received, sent, group=group)
    return out_RD
