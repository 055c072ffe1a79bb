"""Optimizers at a load: what their own code makes of their state, other groups, other classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import holdfast
from holdfast.state.same import same


class Upgrading(torch.optim.AdamW):
    """An optimizer that changes older state in `__setstate__`, as torch's own do."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for slots in self.state.values():
            slots.setdefault("ema", torch.ones(2))
            slots.pop("exp_avg_sq", None)


def hooked(optimizer: Optimizer) -> None:
    def before(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        slots = {n: {**one, "count": 5} for n, one in state["state"].items()}
        return {**state, "state": slots}

    def after(one: Optimizer) -> None:
        for slots in one.state.values():
            slots["ema"] = torch.ones(2)
            slots["exp_avg"] = slots["exp_avg"].to(torch.bfloat16)

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)


@pytest.mark.parametrize("kind", ["hooks", "__setstate__"])
def test_what_an_optimizer_makes_of_its_state_at_a_load_stands(kind: str, tmp_path: Path) -> None:
    """G15. Method: hooks before and after a load and `__setstate__` add, remove and cast slots:
    the same as after torch's own load; nothing of ours stays on the optimizer."""
    model = nn.Linear(2, 2)
    saved = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    saved.step()
    holdfast.save(tmp_path / "one", {"m": model, "o": saved})

    def made() -> Optimizer:
        if kind == "__setstate__":
            return Upgrading(model.parameters())
        one = torch.optim.AdamW(model.parameters())
        hooked(one)
        return one

    expected, found = made(), made()
    expected.load_state_dict(copy.deepcopy(saved.state_dict()))
    before = {*vars(found)}, len(vars(found)["_optimizer_load_state_dict_pre_hooks"])
    holdfast.load(tmp_path / "one", {"m": model, "o": found})
    assert same(found.state_dict(), expected.state_dict())
    assert "ema" in found.state[model.weight]
    assert before == ({*vars(found)}, len(vars(found)["_optimizer_load_state_dict_pre_hooks"]))
