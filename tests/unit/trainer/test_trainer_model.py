"""The model: names and sizes as published, and no look ahead."""

from __future__ import annotations

import pytest
import torch

from holdfast.hf.flavors import LLAMA3, Flavor
from holdfast.trainer.model import NO_RECOMPUTE, Recompute, Transformer, rotary_table, rotate
from holdfast.trainer.weights import init_weights

SMALL = Flavor(32, 2, 4, 2, 48, vocab_size=50)


def built(
    flavor: Flavor = SMALL, *, seed: int = 0, recompute: Recompute = NO_RECOMPUTE
) -> Transformer:
    """A model on the CPU with its initial weights."""
    model = Transformer(flavor, vocab_size=50, seq_len=16, recompute=recompute)
    init_weights(model, seed)
    return model


def test_weights_have_metas_names() -> None:
    """Method: all names of a two-block model, spelt out."""
    block = [
        *(f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")),
        *(f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")),
        *("attention_norm.weight", "ffn_norm.weight"),
    ]
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    expected |= {f"layers.{i}.{name}" for i in range(2) for name in block}
    assert set(built().state_dict()) == expected


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
    """Method: built without memory; a tied weight counts once."""
    with torch.device("meta"):
        model = Transformer(LLAMA3[name], vocab_size=128256, seq_len=8)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.output.weight is model.tok_embeddings.weight) == LLAMA3[name].tied


def test_a_token_changes_nothing_before_it() -> None:
    """Method: two inputs that differ in one token."""
    model = built()
    one = torch.arange(16).remainder(50).unsqueeze(0)
    other = one.clone()
    other[0, 9] = 49
    differs = (model(one) != model(other)).any(-1)[0]
    assert not differs[:9].any()
    assert differs[9:].all()


def test_attention_sees_how_far_apart_tokens_are_and_not_where() -> None:
    """Method: the product of two rotated vectors, both moved on by the same distance."""
    table = rotary_table(32, 8, 500000.0, None)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)
    queries = rotate(query.expand(1, 32, 1, 8), table)[0, :, 0]
    keys = rotate(key.expand(1, 32, 1, 8), table)[0, :, 0]
    products = queries @ keys.T
    for distance in (0, 3, 7):
        along = products.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-5)


def test_rotation_turns_neighbours_as_pairs() -> None:
    """Method: against complex multiplication, the definition."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1))
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(5, 4), torch.outer(torch.arange(5.0), frequency))
    expected = torch.view_as_complex(x.reshape(2, 5, 3, 4, 2)) * turn[None, :, None]
    found = rotate(x, rotary_table(5, 8, 10000.0, None))
    assert torch.allclose(found, torch.view_as_real(expected).flatten(-2), atol=1e-6)


def test_frequencies_are_stretched_at_the_low_end_only() -> None:
    """Method: the 8B flavor's angle at position 1, with and without stretching."""
    flavor = LLAMA3["8B"]
    plain = rotary_table(2, flavor.head_dim, flavor.rope_theta, None)[1, :, 1].asin()
    scaled = rotary_table(2, flavor.head_dim, flavor.rope_theta, flavor.rope_scaling)
    ratio = plain / scaled[1, :, 1].asin()
    assert torch.allclose(ratio[:20], torch.ones(20), atol=1e-4)
    assert torch.allclose(ratio[-20:], torch.full((20,), 8.0), atol=1e-3)
    assert (ratio.diff() >= -1e-3).all()


@pytest.mark.parametrize(
    ("recompute", "times"),
    [
        (NO_RECOMPUTE, [1, 1]),
        (Recompute(every=1), [2, 2]),
        (Recompute(every=2), [1, 2]),
        (Recompute(every=1, keep_products=True), [2, 2]),
    ],
)
def test_recomputing_activations_gives_the_same_gradients(
    recompute: Recompute, times: list[int]
) -> None:
    """Method: the same model with and without; how often each block is computed."""
    tokens, gradients = torch.arange(32).remainder(50).view(2, 16), []
    for model in (built(), built(recompute=recompute)):
        computed = [0] * len(model.layers)
        for number, layer in enumerate(model.layers.values()):

            def count(*_: object, number: int = number, computed: list[int] = computed) -> None:
                computed[number] += 1

            layer.get_submodule("attention").register_forward_pre_hook(count)
        model.train()(tokens).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert computed == times
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_initial_weights_follow_the_seed() -> None:
    """Method: two seeds, one of them twice."""
    one, same, other = (built(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["output.weight"], other["output.weight"])
    assert 0.01 < float(one["layers.0.attention.wq.weight"].std()) < 0.03
