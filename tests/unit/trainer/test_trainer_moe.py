"""Mixture of experts: published names and sizes, and the output of each token's experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import UsageError
from holdfast.hf.flavors import QWEN3_MOE, ExpertFlavor
from holdfast.trainer.arguments import read_config
from holdfast.trainer.model import Transformer
from holdfast.trainer.moe import MixtureOfExperts
from holdfast.trainer.weights import init_weights

EXPERTS = ExpertFlavor(num_experts=4, num_active=2, hidden_dim=24)


def test_expert_weights_are_stacked_under_metas_names() -> None:
    """Method: all names and some shapes of a model with one layer."""
    flavor = replace(QWEN3_MOE["debugmodel"], num_layers=1, experts=EXPERTS, dim=16, num_heads=4)
    with torch.device("meta"):
        state = Transformer(flavor, vocab_size=50, seq_len=8).state_dict()
    attention = ("wq", "wk", "wv", "wo", "q_norm", "k_norm")
    assert set(state) == {
        "tok_embeddings.weight",
        *(f"layers.0.attention.{name}.weight" for name in attention),
        *(f"layers.0.moe.experts.{name}" for name in ("w1", "w2", "w3")),
        "layers.0.moe.router.gate.weight",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    }
    assert state["layers.0.moe.experts.w1"].shape == (4, 24, 16)
    assert state["layers.0.moe.experts.w2"].shape == (4, 16, 24)


@pytest.mark.parametrize(
    ("name", "count"), [("30B-A3B", 30_532_122_624), ("235B-A22B", 235_093_634_560)]
)
def test_flavors_have_the_published_number_of_parameters(name: str, count: int) -> None:
    """Method: models on the meta device."""
    with torch.device("meta"):
        model = Transformer(QWEN3_MOE[name], vocab_size=151936, seq_len=8)
    assert sum(p.numel() for p in model.parameters()) == count


def test_a_token_gets_the_weighted_sum_of_its_experts() -> None:
    """Method: comparison with the definition, token by token."""
    torch.manual_seed(1)
    moe = MixtureOfExperts(16, EXPERTS)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(3, 5, 16)
    output = moe(x)
    w1, w2, w3 = moe.experts.w1, moe.experts.w2, moe.experts.w3
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        token = x[tuple(index)]
        shares, chosen = moe.router.gate(token).softmax(-1).topk(2)
        expected = sum(
            share * (w2[e] @ (F.silu(w1[e] @ token) * (w3[e] @ token)))
            for share, e in zip(shares / shares.sum(), chosen.tolist(), strict=True)
        )
        torch.testing.assert_close(output[tuple(index)], expected)


def test_initial_expert_weights_do_not_depend_on_the_number_of_experts() -> None:
    """Method: models with 4 and with 8 experts share the first 4; experts of a model differ."""
    flavor = replace(QWEN3_MOE["debugmodel"], num_layers=1, experts=EXPERTS)
    few, many = (
        Transformer(replace(flavor, experts=e), vocab_size=50, seq_len=8)
        for e in (EXPERTS, replace(EXPERTS, num_experts=8))
    )
    init_weights(few, 3)
    init_weights(many, 3)
    name = "layers.0.moe.experts.w2"
    weight = few.state_dict()[name]
    assert torch.equal(weight, many.state_dict()[name][:4])
    assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--parallelism.expert_parallel_degree 2", "`model.name` llama3 has no experts"),
        (
            "--model.name qwen3_moe --parallelism.expert_parallel_degree 3",
            "must divide the product of the shard, context and tensor degrees 2, and the 8 experts",
        ),
        (
            "--model.name qwen3_moe --model.flavor 8B",
            "`model.flavor` must be one of debugmodel, 30B",
        ),
    ],
)
def test_experts_that_do_not_divide_over_the_ranks_are_refused(arguments: str, reason: str) -> None:
    """Method: invalid settings with two workers."""
    with pytest.raises(UsageError) as raised:
        read_config(arguments.split()).check(2)
    assert reason in str(raised.value)
