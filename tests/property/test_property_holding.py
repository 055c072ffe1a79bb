"""A planner that is reused from save to save makes the local plans of a new one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.comm import Solo
from holdfast.saving.planner import Planner
from holdfast.state.objects import StateTree

ONE, OTHER = torch.zeros(4), torch.zeros(4)
ALIKE = st.sampled_from([ONE, ONE.detach(), OTHER])
ANY = st.sampled_from(
    [
        torch.zeros(2, 2),
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(4, dtype=torch.int64),
        ONE.view(2, 2),
        ONE[:2],
        ONE.bfloat16(),
        1,
        1.5,
        "text",
    ]
)
NAMES = st.sampled_from(["a", "b", "b.c", "d.e"])
STATES = st.dictionaries(NAMES, ALIKE | ANY)
CHANGES = st.dictionaries(NAMES, ALIKE | ANY | st.none(), max_size=2)


@given(STATES, st.lists(st.tuples(CHANGES, st.sampled_from([None, torch.bfloat16])), max_size=6))
def test_local_plans_do_not_depend_on_earlier_saves(
    state: dict[str, Any], saves: list[tuple[dict[str, Any], torch.dtype | None]]
) -> None:
    """G6. Method: between saves, add and remove entries, change their kind, make them share memory,
    and change the requested dtype."""
    planner = Planner(Solo())
    for changes, dtype in saves:
        state = {n: value for n, value in {**state, **changes}.items() if value is not None}
        leaves = StateTree(state).flatten()
        held, anew = planner.hold(leaves, dtype), Planner(Solo()).hold(leaves, dtype)
        assert held.local_plans == anew.local_plans
