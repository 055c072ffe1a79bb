"""Tensors that code other than an optimizer changes while a save with async_with_pinned_mem copies
the state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import holdfast
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import Ranks
from holdfast.saving.stage import Staging
from holdfast.testing.ranks import run_ranks


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Event that background copies wait for, so that a test decides what happens before them."""
    allowed, run = threading.Event(), Staging.run

    def run_when_allowed(staging: Staging) -> None:
        assert allowed.wait(60)
        run(staging)

    monkeypatch.setattr(Staging, "run", run_when_allowed)
    return allowed


def config(**settings: Any) -> CheckpointConfig:
    given: dict[str, Any] = {"interval": 1, "async_mode": "async_with_pinned_mem"} | settings
    return CheckpointConfig(enable=True, keep_latest_k=0, last_save_model_only=False, **given)


class Codebook(nn.Embedding):
    """Codes that the forward moves as soon as they require no gradients."""

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        if not self.weight.requires_grad:
            self.weight.mul_(0.5).add_(0.25)
        return super().forward(index)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "max_norm": lambda: nn.Embedding(8, 4, max_norm=1.0),
    "max_norm of bags": lambda: nn.EmbeddingBag(8, 4, max_norm=1.0),
    "codebook": lambda: Codebook(8, 4).requires_grad_(requires_grad=False),
    "frozen later": lambda: Codebook(8, 4),
}


class Coded(nn.Module):
    """A layer whose forward may change its own weight, and a head that only optimizers change."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 4)

    def forward(self) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer(torch.arange(8).view(2, 4))).square().mean()
        return out


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_that_a_forward_changes_are_saved_as_they_were(
    kind: str, tmp_path: Path, copies: threading.Event
) -> None:
    """G2. Method: the forward after `save` changes the weight, and the background copy begins only
    then. Every checkpoint has the earlier values. A parameter that is frozen after the second save
    is not mistaken for a trained one, although the plan of the saves stays the same."""
    model = Coded(LAYERS[kind]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight: Any = model.layer.weight
    expected = []
    with CheckpointManager(tmp_path, model=model, optimizers=optimizer, config=config()) as manager:
        for step in range(1, 5):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, -9) if parameter.requires_grad else None
            optimizer.step()
            if step == 3 and kind == "frozen later":
                weight.requires_grad_(requires_grad=False)
            expected.append((weight.detach().clone(), model.head.weight.detach().clone()))
            copies.clear()
            assert manager.save(step)
            model()
            changes = kind != "frozen later" or step >= 3
            assert torch.equal(weight, expected[-1][0]) is not changes
            copies.set()
    for step, (coded, head) in enumerate(expected, 1):
        found = holdfast.open(tmp_path / f"step-{step}")
        assert torch.equal(found.read("layer.weight"), coded)
        assert torch.equal(found.read("head.weight"), head)


def test_a_forward_changes_a_parameter_while_a_large_layer_is_copied(tmp_path: Path) -> None:
    """G2. Method: nothing delays the copy but its size, 64 MB."""
    model = Coded(LAYERS["max_norm"]())
    model.register_parameter("large", nn.Parameter(torch.zeros(4000, 4000)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight: Any = model.layer.weight
    expected = []
    with CheckpointManager(tmp_path, model=model, optimizers=optimizer, config=config()) as manager:
        for step in range(1, 4):
            weight.grad = torch.full_like(weight, -9)
            optimizer.step()
            expected.append(weight.detach().clone())
            manager.save(step)
            model()
    for step, coded in enumerate(expected, 1):
        found = holdfast.open(tmp_path / f"step-{step}")
        assert torch.equal(found.read("layer.weight"), coded)


def in_place(weight: nn.Parameter, _: torch.optim.Optimizer) -> None:
    weight.add_(1)


def in_a_view(weight: nn.Parameter, _: torch.optim.Optimizer) -> None:
    weight.view(-1)[3:5].zero_()


def in_the_state(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[weight]["exp_avg"].zero_()


WAYS: dict[Callable[..., None], str] = {
    in_place: "`weight`: 1 operation in place",
    in_a_view: "`weight`: 1 operation in place",
    in_the_state: "`optimizer.state.weight.exp_avg`: 1 operation in place",
}


def trained(model: nn.Module, make: Any = torch.optim.AdamW, **options: Any) -> Any:
    """An optimizer that has made a step of 1 in every parameter, so that it has state."""
    optimizer = make(model.parameters(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("settings", [{}, {"files": "node"}, {"deduplicate": True}])
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_changes_before_it_is_copied_fails_the_save(
    way: Callable[..., None], settings: dict[str, Any], tmp_path: Path, copies: threading.Event
) -> None:
    """G2, G7. Method: one of two ranks changes a tensor after `save` has returned and before the
    copy. Every rank raises an error that names the tensor, and nothing of the save is left. After
    `wait_for_staging` such a change is allowed."""

    def work(ranks: Ranks) -> None:
        # So large that each rank writes and copies a part of it.
        model = nn.Linear(700, 700)
        optimizer = trained(model)
        with CheckpointManager(
            tmp_path, model=model, optimizers=optimizer, config=config(**settings), ranks=ranks
        ) as manager:
            manager.save(1)
            copies.set()
            manager.wait()
            copies.clear()
            ranks.all_reduce_max([0])
            manager.save(2)
            with torch.no_grad():
                if ranks.rank == 1:
                    way(model.weight, optimizer)
            ranks.all_reduce_max([0])
            copies.set()
            with pytest.raises(holdfast.UsageError) as raised:
                manager.wait()
            assert raised.value.what == (
                "rank 1: tensors changed after `save` was called and before they were copied; "
                f"expected: no change until an optimizer steps, found:\n  {WAYS[way]}"
            )
            assert "manager.wait_for_staging()" in str(raised.value.hint)
            # Rank 0 deletes the attempt before it raises.
            ranks.all_reduce_max([0])
            assert not [*tmp_path.glob("*step-2*")]
            if ranks.rank == 0:
                with torch.no_grad():
                    way(model.weight, optimizer)
            expected = model.weight.detach().clone()
            manager.save(3)
            manager.wait_for_staging()
            with torch.no_grad():
                way(model.weight, optimizer)
            manager.wait()
            assert torch.equal(holdfast.open(tmp_path / "step-3").read("weight"), expected)

    run_ranks(2, work)


def test_a_run_may_go_on_after_a_tensor_has_changed(
    tmp_path: Path, copies: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """G11. Method: with `on_save_error = "warn"`, one save of three fails."""
    model = nn.Linear(3, 3)
    optimizer = trained(model)
    with CheckpointManager(
        tmp_path, model=model, optimizers=optimizer, config=config(on_save_error="warn")
    ) as manager:
        for step in (1, 2, 3):
            copies.clear()
            manager.save(step)
            if step == 2:
                nn.init.ones_(model.bias)
            copies.set()
            manager.wait_for_staging()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-3"]
    assert "a save failed, the run goes on: tensors changed after `save` was called" in caplog.text


def closing(loss: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


OPTIMIZERS: dict[str, Any] = {
    "for loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rate in a tensor": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
    "closure": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1),
    "factored": torch.optim.Adafactor,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_does_not_count_as_a_change(
    kind: str, tmp_path: Path, copies: threading.Event
) -> None:
    """G2. Method: train with scaled and clipped gradients, a learning rate that changes, a compiled
    forward, and an average of the weights. The copy begins only before the step. All checkpoints
    are saved, with the state at the call of `save`."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    forward = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    average = AveragedModel(model)
    scaler = torch.amp.GradScaler("cpu", enabled=kind not in ("closure", "factored"))
    inputs, expected = torch.randn(16, 4), []

    def loss() -> Any:
        return forward(inputs).square().mean()

    with CheckpointManager(
        tmp_path,
        model=model,
        optimizers=optimizer,
        lr_schedulers=scheduler,
        states={"average": average},
        config=config(),
    ) as manager:
        for step in range(1, 5):
            scaler.scale(loss()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            copies.set()
            if kind == "closure":
                optimizer.step(closing(loss, optimizer))
            else:
                scaler.step(optimizer)
                scaler.update()
            scheduler.step()
            average.update_parameters(model)
            optimizer.zero_grad()
            expected.append({name: value.clone() for name, value in model.state_dict().items()})
            copies.clear()
            assert manager.save(step)
        copies.set()
    for step, state in enumerate(expected, 1):
        found = holdfast.open(tmp_path / f"step-{step}")
        for name, value in state.items():
            assert torch.equal(found.read(name), value), name


def test_inference_tensors_are_copied_before_save_returns(
    tmp_path: Path, copies: threading.Event
) -> None:
    """G2: torch does not count the changes of these tensors. Method: an optimizer that has made its
    state in inference mode; and state that becomes so after the first save."""
    for number, later in enumerate((False, True)):
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with torch.inference_mode(not later):
            optimizer.step()
        folder = tmp_path / str(number)
        with CheckpointManager(
            folder, model=model, optimizers=optimizer, config=config()
        ) as manager:
            for step in (1, 2):
                copies.clear()
                manager.save(step)
                with torch.inference_mode():
                    if not later:
                        optimizer.state[model.weight]["momentum_buffer"].add_(1)
                copies.set()
                manager.wait()
                with torch.inference_mode():
                    optimizer.load_state_dict(optimizer.state_dict())
                    for slots in optimizer.state.values():
                        slots["momentum_buffer"] = slots["momentum_buffer"].clone()
        assert optimizer.state[model.weight]["momentum_buffer"].is_inference()
        for step in (1, 2):
            found = holdfast.open(folder / f"step-{step}")
            moment = found.read("optimizer.state.weight.momentum_buffer")
            assert torch.equal(moment, torch.full((3, 3), 1.0 if later else float(step)))


def in_other_memory(weight: nn.Parameter, _: torch.optim.Optimizer) -> None:
    weight.data = weight.data.clone()


def in_memory_of_another_shape(weight: nn.Parameter, _: torch.optim.Optimizer) -> None:
    weight.data = torch.ones(5)


@pytest.mark.parametrize("way", [in_other_memory, in_memory_of_another_shape])
def test_a_tensor_that_gets_other_memory_is_saved_as_it_was(
    way: Callable[..., None], tmp_path: Path, copies: threading.Event
) -> None:
    """G2. Method: a parameter gets other memory after `save` and before the copy, as the forward of
    an RNN moves its weights on a GPU."""
    model = nn.Linear(3, 3)
    optimizer = trained(model)
    expected = model.weight.detach().clone()
    with CheckpointManager(tmp_path, model=model, optimizers=optimizer, config=config()) as manager:
        manager.save(1)
        way(model.weight, optimizer)
        model.weight.data.fill_(9)
        copies.set()
        manager.wait()
    assert torch.equal(holdfast.open(tmp_path / "step-1").read("weight"), expected)
