"""A planner reuses the encoded index while the layout stays the same."""

from __future__ import annotations

import torch

from holdfast.comm import Solo
from holdfast.format.manifest import Span
from holdfast.saving.planner import LocalState, Planner
from holdfast.state.objects import StateTree


def held(planner: Planner, *shapes: tuple[int, ...]) -> LocalState:
    state = {"step": 1, **{f"w{n}": torch.zeros(shape) for n, shape in enumerate(shapes)}}
    return planner.hold(StateTree(state).flatten(), None)


def stock_parts(planner: Planner, offset: int) -> list[bytes | bytearray]:
    assert planner.index is not None
    return planner.index.encoded().stock.encode({"step": ("__0_0.distcp", Span(offset, 100))})


def test_both_indices_are_encoded_once_per_layout() -> None:
    """Method: the encoded objects are kept for equal shapes in other memory and for a value at
    another offset; they are new after a change of a shape."""
    planner = Planner(Solo())
    planner.agree(held(planner, (3, 4), (5,)))
    first, parts = planner.index, stock_parts(planner, 1000)
    planner.agree(held(planner, (3, 4), (5,)))
    assert planner.index is first
    again = stock_parts(planner, 2000)
    assert all(one is other for one, other in zip(parts[:-1], again[:-1], strict=True))
    assert again[-1] != parts[-1], "the place of the value"
    planner.agree(held(planner, (3, 4), (6,)))
    assert planner.index is not first
    assert stock_parts(planner, 1000)[0] != parts[0]
