"""Optimizers of all kinds: a resumed run ends with the same bits as one without interruption."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

import holdfast
from extent import every
from holdfast.errors import MismatchError, UsageError
from holdfast.state.same import same
from holdfast.testing import round_trip

Make = Callable[[nn.Module], Any]
Step = Callable[[Any, Callable[[], torch.Tensor]], object]

pytestmark = pytest.mark.filterwarnings("ignore")
"""Ignore warnings from other packages."""


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))


def large() -> nn.Module:
    """Large enough that 8-bit optimizers quantize its weights in blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 8))


def plainly(optimizer: Any, closure: Callable[[], torch.Tensor]) -> None:
    """Compute gradients, then step."""
    closure()
    for one in optimizer if isinstance(optimizer, list) else [optimizer]:
        one.step()


def trained(
    make: Make, folder: Path, until: int, *, net: Callable[[], nn.Module], step: Step, mode: Any
) -> dict[str, torch.Tensor]:
    """Return the weights after some steps, each of them saved; resume if the folder has any."""
    model = net()
    optimizer = make(model)
    config = holdfast.CheckpointConfig(
        enable=True, interval=1, last_save_model_only=False, async_mode=mode, stop_signals=()
    )
    with holdfast.CheckpointManager(
        folder, model=model, optimizers=optimizer, config=config
    ) as manager:
        for number in range(manager.load() + 1, until + 1):
            batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                model.zero_grad()
                loss: torch.Tensor = (model(batch) - batch.flip(0)).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            step(optimizer, closure)
            manager.save(number)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_exact(
    make: Make,
    folder: Path,
    *,
    net: Callable[[], nn.Module] = small,
    step: Step = plainly,
    mode: str = "disabled",
) -> None:
    """Compare three steps, fresh objects and three more steps with six steps, in every bit."""
    more = {"net": net, "step": step, "mode": mode}
    whole = trained(make, folder / "whole", 6, **more)  # type: ignore[arg-type]
    trained(make, folder / "halves", 3, **more)  # type: ignore[arg-type]
    halves = trained(make, folder / "halves", 6, **more)  # type: ignore[arg-type]
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def others(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim != 2]


class Joined(Optimizer):
    """Joins several optimizers, with its own `state_dict`."""

    def __init__(self, *inner: Optimizer) -> None:
        self.inner = inner
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inner:
            one.step(closure)

    def state_dict(self) -> Any:
        return {str(number): one.state_dict() for number, one in enumerate(self.inner)}

    def load_state_dict(self, state_dict: Any) -> None:
        for number, one in enumerate(self.inner):
            one.load_state_dict(state_dict[str(number)])


TORCH: dict[str, Make] = {
    **{
        name: lambda m, name=name: getattr(torch.optim, name)(m.parameters(), lr=0.01)  # type: ignore[misc]
        for name in (
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "ASGD",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        )
    },
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
    "lr tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "names": lambda m: torch.optim.AdamW(m.named_parameters()),
    "Muon": lambda m: torch.optim.Muon(matrices(m)),
    "several": lambda m: [torch.optim.Muon(matrices(m)), torch.optim.AdamW(others(m))],
    "joined": lambda m: Joined(torch.optim.Muon(matrices(m)), torch.optim.AdamW(others(m))),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for number, name in enumerate(TORCH)
        for mode in every(2, ("disabled", "async_with_pinned_mem"), start=number)
    ],
)
def test_every_optimizer_of_torch_continues_bit_for_bit(
    name: str, mode: str, tmp_path: Path
) -> None:
    """G9, G15. Method: torch's own, with options that change their slots; several, joined. By
    default, each in one of the two modes."""
    assert_exact(TORCH[name], tmp_path, mode=mode)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_an_optimizer_with_lists_on_one_parameter_continues_bit_for_bit(
    search: Any, tmp_path: Path
) -> None:
    """G9, G15. Method: LBFGS, whose state is empty at first, and then numbers and lists."""
    assert_exact(
        lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, line_search_fn=search),
        tmp_path,
        step=lambda optimizer, closure: optimizer.step(closure),
    )


def test_an_optimizer_of_sparse_gradients_continues_bit_for_bit(tmp_path: Path) -> None:
    """G9, G15. Method: SparseAdam, which counts steps in plain numbers."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rows = nn.Embedding(10, 8, sparse=True)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.rows(batch.argmax(-1)) + batch  # type: ignore[no-any-return]

    assert_exact(lambda m: torch.optim.SparseAdam(m.parameters()), tmp_path, net=Table)


def pytorch_optimizer(name: str) -> Make:
    def make(model: nn.Module) -> Any:
        package = pytest.importorskip("pytorch_optimizer")
        if name == "Muon":
            groups = [
                {"params": matrices(model), "use_muon": True},
                {"params": others(model), "use_muon": False},
            ]
            return package.Muon(groups)
        if name == "Lookahead":
            return package.Lookahead(torch.optim.AdamW(model.parameters()))
        optimizer = getattr(package, name)(model.parameters())
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


@pytest.mark.parametrize(
    "name",
    [
        "Adan",
        "Prodigy",
        "SOAP",
        "ScheduleFreeAdamW",
        "ScheduleFreeSGD",
        "Muon",
        "Shampoo",
        "Lion",
        "Ranger",
        "DAdaptAdam",
        "AdEMAMix",
        "CAME",
        "APOLLO",
        "Lookahead",
        "SM3",
    ],
)
def test_optimizers_of_a_package_continue_bit_for_bit(name: str, tmp_path: Path) -> None:
    """G9, G15. Method: `pytorch_optimizer`: numbers, None, and options that change in training."""
    assert_exact(pytorch_optimizer(name), tmp_path)


def test_an_optimizer_with_an_object_in_a_slot_is_refused_or_trusted(tmp_path: Path) -> None:
    """G8, G15. Method: GaLore's projector has its own class: the refusal names it and how to trust
    it; once trusted, training continues bit for bit."""
    package = pytest.importorskip("pytorch_optimizer")
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    def make(model: nn.Module) -> Any:
        projected = {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}
        return package.GaLore([{"params": matrices(model), **projected}, {"params": others(model)}])

    with pytest.raises(UsageError, match=r"projector` is a .*GaLoreProjector") as refused:
        assert_exact(make, tmp_path / "refused")
    assert "add_safe_globals([GaLoreProjector])" in str(refused.value.hint)
    with torch.serialization.safe_globals([GaLoreProjector]):
        assert_exact(make, tmp_path / "trusted")


def test_the_adafactor_of_transformers_continues_bit_for_bit(tmp_path: Path) -> None:
    """G9, G15. Method: slots of other shapes than the parameter, and a rate of its own."""
    from transformers.optimization import Adafactor

    assert_exact(lambda m: Adafactor(m.parameters(), warmup_init=True), tmp_path)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW32bit"])
def test_optimizers_of_bitsandbytes_continue_bit_for_bit(name: str, tmp_path: Path) -> None:
    """G9, G15. Method: 8-bit moments with their tables, from the package's own step."""
    package = pytest.importorskip("bitsandbytes")
    more = {"min_8bit_size": 16} if "8bit" in name else {}
    assert_exact(
        lambda m: getattr(package.optim, name)(m.parameters(), **more), tmp_path, net=large
    )


def test_an_8_bit_optimizer_with_tensor_subclasses_is_restored() -> None:
    """G15. Method: torchao, whose slots are tensors of its own class, which a fresh optimizer does
    not have yet. Since its step is compiled, the slots are created by its own functions instead."""
    torchao = pytest.importorskip("torchao.optim")
    model = large()
    optimizer = torchao.AdamW8bit(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": optimizer._new_buffer(parameter, signed=True),
            "exp_avg_sq": optimizer._new_buffer(parameter, signed=False),
        }
        optimizer.state[parameter]["exp_avg"].copy_(torch.randn(parameter.shape))
    fresh = large()
    again = torchao.AdamW8bit(fresh.parameters())
    round_trip({"model": model, "optimizer": optimizer}, fresh={"model": fresh, "optimizer": again})


def test_added_options_and_state_without_a_parameter_are_restored() -> None:
    """G15. Method: options of all kinds; state that belongs to no parameter; numbers, None, texts
    and lists in slots; slots under numbers; an empty slot; a group without parameters."""
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [
        {"params": [model.weight]},
        {"params": [model.bias], "lr": 0.5},
        {"params": []},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    first = optimizer.param_groups[0]
    first |= {"step": 100, "note": "text", "table": {1: [2]}, "scale": torch.ones(1), "none": None}
    optimizer.param_groups[2]["warm"] = [1, {"x": torch.ones(1)}]
    optimizer.state["global"] = {"count": 3, 0: [torch.ones(2)]}  # type: ignore[index]
    optimizer.state[model.weight] = {"count": 1, "old": [None, torch.ones(2)], "name": "text"}
    optimizer.state[model.bias] = {0: torch.ones(2), "a.b": (1, 2), "empty": {}}
    fresh = nn.Linear(2, 2)
    held: list[list[torch.Tensor]] = [[fresh.weight], [fresh.bias], []]
    again = torch.optim.SGD([{"params": one} for one in held], lr=9.0)
    round_trip({"model": model, "optimizer": optimizer}, fresh={"model": fresh, "optimizer": again})
    assert again.state[fresh.weight]["name"] == "text"


def test_slots_keep_their_dtypes_although_torch_casts_them() -> None:
    """G15. Method: float32 moments of bfloat16 parameters, counters, 8-bit numbers."""
    model = nn.Linear(2, 2).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "moment": torch.full(parameter.shape, 1 / 3),
            "codes": torch.arange(3, dtype=torch.uint8),
            "count": torch.tensor(2**40 + 1),
        }
    round_trip({"model": model, "optimizer": optimizer})


def test_optimizers_without_a_step_or_without_state_are_restored(tmp_path: Path) -> None:
    """G15. Method: slots created after the save are gone after the load."""
    model = nn.Linear(2, 2)
    for make in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = make(model.parameters(), lr=0.25)
        holdfast.save(tmp_path / "one", {"model": model, "opt": optimizer}, overwrite=True)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 7.0
        holdfast.load(tmp_path / "one", {"model": model, "opt": optimizer})
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.25


def test_groups_in_another_order_are_matched_by_the_names_of_their_parameters(
    tmp_path: Path,
) -> None:
    """G15. Method: another order of groups and parameters; parameters that were saved with
    different options but are in one group here are refused by name."""
    model = nn.Linear(2, 2)
    rates: list[dict[str, Any]] = [
        {"params": [model.weight], "lr": 1.0},
        {"params": [model.bias], "lr": 2.0},
    ]
    optimizer = torch.optim.AdamW(rates)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    holdfast.save(tmp_path / "one", {"model": model, "opt": optimizer})
    moved: Any = [{"params": [model.bias]}, {"params": [model.weight]}]
    moved = torch.optim.AdamW(moved)
    holdfast.load(tmp_path / "one", {"model": model, "opt": moved})
    assert [group["lr"] for group in moved.param_groups] == [2.0, 1.0]
    assert same(dict(moved.state[model.bias]), dict(optimizer.state[model.bias]))
    joined = torch.optim.AdamW(model.parameters())
    with pytest.raises(MismatchError, match=r"`weight` and `bias` are in one group.*`lr`"):
        holdfast.load(tmp_path / "one", {"model": model, "opt": joined})


def test_parameters_on_one_side_only_are_mismatches(tmp_path: Path) -> None:
    """G6. Method: one more parameter, one fewer, no optimizer at all; nothing changes."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    part = torch.optim.AdamW(model["a"].parameters(), lr=0.5)
    holdfast.save(tmp_path / "part", {"model": model, "opt": part})
    holdfast.save(tmp_path / "none", {"model": model})
    whole = torch.optim.AdamW(model.parameters(), lr=9.0)
    with pytest.raises(MismatchError, match=r"`opt\.state\.b\.weight` is not in the checkpoint"):
        holdfast.load(tmp_path / "part", {"model": model, "opt": whole})
    with pytest.raises(MismatchError, match="`opt` is not in the checkpoint"):
        holdfast.load(tmp_path / "none", {"model": model, "opt": whole})
    assert whole.param_groups[0]["lr"] == 9.0
    holdfast.save(tmp_path / "whole", {"model": model, "opt": whole})
    with pytest.raises(MismatchError, match=r"`opt\.param_groups\.b\.weight\.lr` is in the"):
        holdfast.load(tmp_path / "whole", {"model": model, "opt": part})


def test_hooks_of_an_optimizer_are_called_and_one_that_changes_the_form_is_refused(
    tmp_path: Path,
) -> None:
    """G15. Method: a pair of hooks that add and remove an entry; one that renames parameters."""
    model = nn.Linear(2, 2)

    def made() -> tuple[Optimizer, list[Any]]:
        seen: list[Any] = []
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": {3: [1]}})
        optimizer.register_load_state_dict_pre_hook(lambda _, s: seen.append(s.pop("extra")))
        return optimizer, seen

    one, _ = made()
    two, seen = made()
    holdfast.save(tmp_path / "one", {"model": model, "opt": one})
    holdfast.load(tmp_path / "one", {"model": model, "opt": two})
    assert seen == [{3: [1]}]
    one.register_state_dict_post_hook(lambda _, s: {**s, "param_groups": [{"params": ["a", "b"]}]})
    with pytest.raises(UsageError, match=r"`state_dict\(\)` of SGD is not in torch's form"):
        holdfast.save(tmp_path / "two", {"model": model, "opt": one})


@pytest.mark.parametrize("form", ["numbers", "names", "flattened"])
def test_an_optimizer_loads_every_form_of_its_state_in_stock_dcp(form: str, tmp_path: Path) -> None:
    """G10. Method: `optimizer.state_dict()`, and both forms of `get_optimizer_state_dict`, saved by
    stock DCP; loaded into a fresh optimizer."""
    dcp: Any = import_module("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = small()
    rates = {"params": matrices(model), "lr": 0.5}, {"params": others(model), "lr": 0.25}
    optimizer: Any = torch.optim.AdamW(list(rates))
    loss: Any = model(torch.ones(2, 8)).square().sum()
    loss.backward()
    optimizer.step(None)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    forms: dict[str, Any] = {
        "numbers": lambda: optimizer.state_dict(),
        "names": lambda: get_optimizer_state_dict(model, optimizer),
        "flattened": lambda: get_optimizer_state_dict(model, optimizer, options=flat),
    }
    stored = forms[form]()
    dcp.save({"model": model.state_dict(), "optimizer": stored}, checkpoint_id=tmp_path / "stock")
    fresh = small()
    again = torch.optim.AdamW([{"params": matrices(fresh)}, {"params": others(fresh)}])
    holdfast.load(tmp_path / "stock", {"model": fresh, "optimizer": again})
    assert [group["lr"] for group in again.param_groups] == [0.5, 0.25]
    assert same(again.state_dict()["state"], optimizer.state_dict()["state"])


def swap(net: Any) -> None:
    net[0], net[2] = net[2], net[0]


def wrap(net: Any) -> None:
    net[0] = checkpoint_wrapper(net[0])


def rename(net: Any) -> None:
    net.add_module("more", net[2])
    del net[2]


@pytest.mark.parametrize("change", [swap, rename, lambda net: net.insert(0, nn.Identity()), wrap])
@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_moments_follow_their_layer_when_modules_move(
    change: Callable[[Any], None], mode: Any, tmp_path: Path
) -> None:
    """G15. Method: between two saves of one manager, layers change places, get another name or a
    wrapper, with the same optimizer object. A fresh run with the new modules loads each layer's own
    moments."""

    def start() -> tuple[Any, Any]:
        net: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    config = holdfast.CheckpointConfig(
        enable=True, interval=1, last_save_model_only=False, async_mode=mode, stop_signals=()
    )
    net, optimizer = start()
    net(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    with holdfast.CheckpointManager(
        tmp_path, model=net, optimizers=optimizer, config=config
    ) as manager:
        manager.save(1)
        change(net)
        manager.save(2)
    fresh, fresh_optimizer = start()
    change(fresh)
    with holdfast.CheckpointManager(
        tmp_path, model=fresh, optimizers=fresh_optimizer, config=config
    ) as manager:
        assert manager.load() == 2
    for one, other in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
        found = fresh_optimizer.state.get(other, {})
        assert same(dict(optimizer.state.get(one, {})), dict(found))


def test_a_scripted_modules_parameters_are_named(tmp_path: Path) -> None:
    """G15. Method: `torch.jit.script` keeps its modules in containers of its own."""
    net = torch.jit.script(small())
    optimizer = torch.optim.AdamW(net.parameters())
    plainly(optimizer, lambda: net(torch.rand(2, 8)).sum().backward())
    holdfast.save(tmp_path / "x", {"model": net, "optimizer": optimizer})
    assert "optimizer.state.0.weight.exp_avg" in holdfast.open(tmp_path / "x").tensors
