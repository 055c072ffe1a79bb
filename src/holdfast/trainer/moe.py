"""Mixture of experts as in Qwen3: a router sends each token to a few experts.

A tensor's name ends in its shape, with the letters of `model` and:

    N  tokens of all sequences        X  experts
    C  experts of each token          R  rows to compute: N x C, or as many as other ranks have sent

There is no load-balancing loss, since it would depend on which tokens share a batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from holdfast.hf.flavors import ExpertFlavor


class MixtureOfExperts(nn.Module):
    """Sum of each token's expert outputs, weighted by the router."""

    def __init__(self, dim: int, flavor: ExpertFlavor) -> None:
        super().__init__()
        self.router: Router = Router(dim, flavor)
        self.experts: Experts = Experts(dim, flavor)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weight_NC, expert_NC = self.router(x_ND)
        # Rows sorted by expert, then by token.
        order_R = expert_NC.flatten().argsort(stable=True)
        count_X = torch.bincount(expert_NC.flatten(), minlength=self.experts.num_experts)
        out_RD = self.experts(x_ND[order_R // expert_NC.shape[1]], count_X)
        # Back to token order by indexing: adding into the output would sum in a random order.
        out_NCD = out_RD[order_R.argsort()].unflatten(0, expert_NC.shape)
        out_ND: Tensor = (out_NCD * weight_NC.unsqueeze(-1).type_as(out_NCD)).sum(1)
        return out_ND.view_as(x_BTD)


class Router(nn.Module):
    """Choice of each token's experts, and their weights."""

    def __init__(self, dim: int, flavor: ExpertFlavor) -> None:
        super().__init__()
        self.num_active: int = flavor.num_active
        self.normalized: bool = flavor.normalized
        self.gate: nn.Linear = nn.Linear(dim, flavor.num_experts, bias=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        share_NX = self.gate(x_ND).float().softmax(-1)
        weight_NC, expert_NC = share_NX.topk(self.num_active, dim=-1)
        if self.normalized:
            weight_NC = weight_NC / weight_NC.sum(-1, keepdim=True)
        return weight_NC, expert_NC


class Experts(nn.Module):
    """Experts, each a SwiGLU whose matrices are slices of `w1`, `w2` and `w3`."""

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
        """Number of experts on each expert-parallel rank."""
        return self.num_experts // (1 if self.group is None else self.group.size())

    def apply_expert_parallel(self, mesh: DeviceMesh) -> None:
        """Divide the experts evenly over the ranks of `mesh`. `forward` then sends each token to
        the ranks that have its experts."""
        self.group = mesh.get_group()
        for name, weight in list(self.named_parameters()):
            sharded = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            setattr(self, name, nn.Parameter(sharded))

    def forward(self, x_RD: Tensor, count_X: Tensor) -> Tensor:
        """Return for each row of `x_RD` the output of its expert.

        A row is one token for one of its experts. The rows are sorted by expert; `count_X` has the
        number of rows of each expert. Collective over the ranks that divide the experts, forward
        and backward.
        """
        if self.group is None:
            return self._compute(x_RD, count_X.tolist())
        num_ranks = self.group.size()
        # One row per rank, one column per expert of that rank.
        sent_counts = count_X.view(num_ranks, -1)
        received_counts = torch.empty_like(sent_counts)
        dist.all_to_all_single(received_counts, sent_counts.contiguous(), group=self.group)
        sent, received = sent_counts.sum(1).tolist(), received_counts.sum(1).tolist()
        # Rows arrive sorted by rank, and are computed sorted by expert.
        arrived_RD = all_to_all_single_autograd(x_RD.contiguous(), received, sent, self.group)
        by_rank = torch.split(arrived_RD, received_counts.flatten().tolist())
        num_local = received_counts.shape[1]
        sorted_RD = torch.cat([x for e in range(num_local) for x in by_rank[e::num_local]])
        out_RD = self._compute(sorted_RD, received_counts.sum(0).tolist())
        by_expert = torch.split(out_RD, received_counts.t().flatten().tolist())
        returned_RD = torch.cat([x for r in range(num_ranks) for x in by_expert[r::num_ranks]])
        return all_to_all_single_autograd(returned_RD, sent, received, self.group)

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
