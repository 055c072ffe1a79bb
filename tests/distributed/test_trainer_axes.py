"""Training in every layout gives the model of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from extent import every, some
from holdfast.hf.flavors import MODELS
from layouts import Layout, add_flavors, train_all, trained
from processes import run_processes

pytestmark = pytest.mark.timeout(400)  # the first test of a group runs the whole group

ON_4 = [
    Layout("shard4", "recompute"),
    Layout("replicate4"),
    Layout("tp4"),
    Layout("pp4"),
    Layout("cp4"),
    Layout("shard4 ep2", "experts"),
    Layout("shard2 tp2", "tied"),
    Layout("replicate2 shard2 ep2", "experts recompute"),
    Layout("replicate2 tp2"),
    Layout("replicate2 pp2"),
    Layout("replicate2 cp2"),
    Layout("shard2 pp2", "recompute"),
    Layout("shard2 pp2", schedule="GPipe"),
    Layout("shard2 pp2", schedule="Interleaved1F1B"),
    Layout("shard2 cp2 ep4", "experts"),
    Layout("tp2 pp2 ep2", "experts", schedule="Interleaved1F1B"),
    Layout("tp2 cp2"),
    Layout("pp2 cp2"),
]
"""Layouts in which every axis is alone, or combined with one other axis."""

ON_8 = [Layout("shard2 tp2 pp2"), Layout("shard2 tp2 pp2 ep4", "experts")]

MORE_ON_4 = [
    Layout("shard4"),
    Layout("shard4 ep4", "experts"),
    Layout("shard2 tp2 ep2", "experts"),
    Layout("shard2 tp2 ep4", "experts"),
    Layout("shard2 pp2 ep2", "experts recompute", schedule="Interleaved1F1B"),
    Layout("replicate2 shard2"),
    Layout("replicate4", "experts"),
    Layout("replicate2 tp2 ep2", "experts"),
    Layout("replicate2 pp2", "experts"),
    Layout("tp4", "experts"),
    Layout("tp4 ep4", "experts"),
    Layout("tp2 pp2", "experts", schedule="GPipe"),
    Layout("tp2 cp2", "recompute"),
    Layout("tp2 cp2 ep2", "experts"),
    Layout("tp2 cp2 ep4", "experts recompute"),
    Layout("pp4", "experts"),
    Layout("pp2 cp2 ep2", "experts"),
    Layout("cp4 ep4", "experts"),
]
MORE_ON_8 = [
    Layout("replicate2 shard2 tp2"),
    Layout("replicate2 shard2 pp2", schedule="Interleaved1F1B"),
    Layout("replicate2 shard2 cp2 ep4", "experts"),
    Layout("replicate2 tp2 pp2 ep2", "experts"),
    Layout("replicate2 cp2 pp2"),
    Layout("shard2 tp2 cp2 ep8", "experts"),
    Layout("shard2 cp2 pp2 ep2", "experts", schedule="GPipe"),
    Layout("tp2 cp2 pp2", "recompute"),
    Layout("tp4 pp2 ep2", "experts", schedule="Interleaved1F1B"),
]
GROUPS = {
    "4": (4, every(6, ON_4)),
    "8": (8, some(ON_8, 1)),
    "more 4": (4, MORE_ON_4),
    "more 8": (8, MORE_ON_8),
}

Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Return the function that trains in all layouts of a group."""

    @cache
    def train_group(group: str) -> list[dict[str, Any]]:
        size, layouts = GROUPS[group]
        # New processes after three layouts: each layout creates many gloo groups, and an unused
        # group still costs processor time.
        batches = (layouts[start : start + 3] for start in range(0, len(layouts), 3))
        return [result for batch in batches for result in run_processes(size, train_all, batch)[0]]

    return train_group


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    """Train each kind of model in one process."""
    original = {name: dict(flavors) for name, flavors in MODELS.items()}
    add_flavors()
    num_threads = torch.get_num_threads()
    # One thread: several would wait for each other on busy cores.
    torch.set_num_threads(1)
    yield {kind: trained(Layout("", kind)) for kind in ("small", "tied", "experts")}
    torch.set_num_threads(num_threads)
    for name, flavors in original.items():
        MODELS[name].clear()
        MODELS[name].update(flavors)


def cases() -> Iterator[Any]:
    for group, (_, layouts) in GROUPS.items():
        marks = [pytest.mark.slow] if group.startswith("more") else []
        for number, layout in enumerate(layouts):
            yield pytest.param(group, number, id=str(layout), marks=marks)


@pytest.mark.parametrize(("group", "number"), list(cases()))
def test_every_layout_trains_the_model_of_one_process(
    group: str, number: int, results: Results, alone: dict[str, Any]
) -> None:
    """Method: train with SGD, since AdamW would hide a gradient of the wrong scale. Initial weights
    have the same bits. Gradients, losses, norms and the weights after some steps agree within 1e-5.
    """
    layout, found = GROUPS[group][1][number], results(group)[number]
    # Recomputation changes no result, so one process trains without it.
    expected = alone[layout.kind.removesuffix("recompute").strip() or "small"]
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
    for report, expected_report in zip(found["reports"], expected["reports"], strict=True):
        assert report == pytest.approx(expected_report, rel=2e-6)
    for name, weight in expected["after"].items():
        torch.testing.assert_close(found["after"][name], weight, atol=1e-5, rtol=0)
        assert not torch.equal(weight, expected["before"][name]), name
