"""The model: published names and sizes, causal attention, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.hf.flavors import LLAMA3, Flavor
from holdfast.trainer.config import ActivationCheckpointConfig
from holdfast.trainer.model import Transformer, rotary_table, rotate
from holdfast.trainer.weights import init_weights

SMALL = Flavor(32, 2, 4, 2, 48, vocab_size=50)


def build(seed: int = 0, recompute: ActivationCheckpointConfig | None = None) -> Transformer:
    """Build a model on the CPU with its initial weights."""
    model = Transformer(SMALL, vocab_size=50, seq_len=16, recompute=recompute)
    init_weights(model, seed)
    return model


def test_weights_have_metas_names() -> None:
    """Method: all names of a model with two layers."""
    layer = [
        "attention.wq.weight",
        "attention.wk.weight",
        "attention.wv.weight",
        "attention.wo.weight",
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
        "feed_forward.w3.weight",
        "attention_norm.weight",
        "ffn_norm.weight",
    ]
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    expected |= {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert set(build().state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("1B", 1_235_814_400),
        ("3B", 3_212_749_824),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_flavors_have_the_published_number_of_parameters(name: str, count: int) -> None:
    """Method: models on the meta device; a tied weight counts once."""
    with torch.device("meta"):
        model = Transformer(LLAMA3[name], vocab_size=128256, seq_len=8)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.output.weight is model.tok_embeddings.weight) == LLAMA3[name].tied


def test_a_token_affects_only_its_own_and_later_logits() -> None:
    """Method: two inputs that differ in one token."""
    model = build()
    tokens = torch.arange(16).remainder(50).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 9] = 49
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert not differs[:9].any()
    assert differs[9:].all()


def test_rotary_attention_depends_only_on_the_distance_between_tokens() -> None:
    """Method: products of two rotated vectors at all pairs of positions of the same distance."""
    table = rotary_table(32, 8, 500000.0, None)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)
    queries = rotate(query.expand(1, 32, 1, 8), table)[0, :, 0]
    keys = rotate(key.expand(1, 32, 1, 8), table)[0, :, 0]
    products = queries @ keys.T
    for distance in (0, 3, 7):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)


def test_rotation_equals_complex_multiplication_of_neighbouring_pairs() -> None:
    """Method: a random tensor against the definition."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1))
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(5, 4), torch.outer(torch.arange(5.0), frequency))
    expected = torch.view_as_complex(x.reshape(2, 5, 3, 4, 2)) * turn[None, :, None]
    found = rotate(x, rotary_table(5, 8, 10000.0, None))
    assert torch.allclose(found, torch.view_as_real(expected).flatten(-2), atol=1e-6)


def test_rope_scaling_changes_only_low_frequencies() -> None:
    """Method: the 8B flavor's angles at position 1, with and without scaling."""
    flavor = LLAMA3["8B"]
    plain = rotary_table(2, flavor.head_dim, flavor.rope_theta, None)[1, :, 1].asin()
    scaled = rotary_table(2, flavor.head_dim, flavor.rope_theta, flavor.rope_scaling)
    ratio = plain / scaled[1, :, 1].asin()
    assert torch.allclose(ratio[:20], torch.ones(20), atol=1e-4)
    assert torch.allclose(ratio[-20:], torch.full((20,), 8.0), atol=1e-3)
    assert (ratio.diff() >= -1e-3).all()


@pytest.mark.parametrize(
    ("mode", "option", "times"),
    [
        ("none", "2", [1, 1]),
        ("full", "2", [2, 2]),
        ("selective", "2", [1, 2]),
        ("selective", "op", [2, 2]),
    ],
)
def test_recomputing_activations_gives_the_same_gradients(
    mode: Any, option: str, times: list[int]
) -> None:
    """Method: the same model with and without; each layer counts its forward passes."""
    recompute = ActivationCheckpointConfig(mode, option)
    tokens, gradients = torch.arange(32).remainder(50).view(2, 16), []
    for model in (build(), build(recompute=recompute)):
        computed = [0] * len(model.layers)
        for number, layer in enumerate(model.layers.values()):

            def count(*_: object, number: int = number, computed: list[int] = computed) -> None:
                computed[number] += 1

            layer.get_submodule("attention").register_forward_pre_hook(count)
        model.train()(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert computed == times
    for expected, recomputed in zip(gradients[0], gradients[1], strict=True):
        assert expected is not None
        assert recomputed is not None
        assert torch.equal(expected, recomputed)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Method: two seeds, the first used twice."""
    first, again, other = (build(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])
    assert 0.01 < float(first["layers.0.attention.wq.weight"].std()) < 0.03
