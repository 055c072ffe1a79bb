"""Every layout trains the model that one process trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from holdfast.trainer.flavors import MODELS
from layouts import Layout, add_flavors, train_all, trained
from processes import run_processes

ON_4 = [
    Layout("shard4"),
    Layout("shard4", "recompute"),
    Layout("shard2 tp2"),
    Layout("shard2 tp2", "tied"),
    Layout("tp4"),
    Layout("replicate4"),
    Layout("replicate2 shard2"),
    Layout("replicate2 tp2"),
    Layout("pp4"),
    Layout("pp2 shard2"),
    Layout("pp2 shard2", "recompute"),
    Layout("pp2 replicate2"),
    Layout("pp2 tp2"),
    Layout("pp2 shard2", schedule="GPipe"),
    Layout("pp2 shard2", schedule="Interleaved1F1B"),
    Layout("pp2 tp2", schedule="Interleaved1F1B"),
    Layout("cp4"),
    Layout("cp2 shard2", "recompute"),
    Layout("cp2 replicate2"),
    Layout("cp2 tp2"),
    Layout("cp2 pp2"),
]
ON_8 = [Layout("replicate2 shard2 tp2"), Layout("shard2 tp2 pp2")]


@pytest.fixture(scope="module")
def on_4() -> Any:
    return run_processes(4, train_all, ON_4)[0]


@pytest.fixture(scope="module")
def on_8() -> Any:
    return run_processes(8, train_all, ON_8)[0]


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    """What one process comes to, by kind of model."""
    known = {name: dict(flavors) for name, flavors in MODELS.items()}
    add_flavors()
    yield {layout.kind: trained(Layout("", layout.kind)) for layout in ON_4 + ON_8}
    for name, flavors in known.items():
        MODELS[name].clear()
        MODELS[name].update(flavors)


def check(layout: Layout, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["before"].keys() == expected["before"].keys()
    for name, weight in expected["before"].items():
        assert torch.equal(found["before"][name], weight), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    differences = {
        name: (found["gradients"][name] - gradient).abs().max().item()
        for name, gradient in expected["gradients"].items()
    }
    print(f"{layout}: gradients differ by {max(differences.values()):.1e} at most")  # noqa: T201
    assert max(differences.values()) < 1e-5, differences
    for one, other in zip(found["reports"], expected["reports"], strict=True):
        assert one == pytest.approx(other, rel=2e-6)
    for name, weight in expected["after"].items():
        torch.testing.assert_close(found["after"][name], weight, atol=1e-5, rtol=0)
        assert not torch.equal(weight, expected["before"][name]), name


@pytest.mark.parametrize("number", range(len(ON_4)), ids=map(str, ON_4))
def test_a_layout_of_4_ranks_trains_as_one_process_does(
    number: int, on_4: Any, alone: dict[str, Any]
) -> None:
    """Method: SGD; weights equal bit by bit before, then gradients, losses, norms and weights."""
    check(ON_4[number], on_4[number], alone[ON_4[number].kind])


@pytest.mark.parametrize("number", range(len(ON_8)), ids=map(str, ON_8))
def test_a_layout_of_8_ranks_trains_as_one_process_does(
    number: int, on_8: Any, alone: dict[str, Any]
) -> None:
    """Method: as with 4."""
    check(ON_8[number], on_8[number], alone[ON_8[number].kind])
