"""Adapters on a frozen base: checkpoints hold only trained parameters, and the base is stored
once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_folders import hf_tensors, save_folder
from holdfast.catalog.catalog import open_manifest
from holdfast.comm import Ranks
from holdfast.errors import MismatchError, NotFoundError, UsageError
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import MODELS, config_of
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.saving.save import save
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import run_ranks
from holdfast.trainer.model import Transformer

TRAINED = {"up.lora_a", "up.lora_b", "down.lora_a", "down.lora_b"}


class Adapted(nn.Linear):
    """A frozen layer, and a trained low-rank adapter of two factors."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim)
        self.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(2, dim))
        self.lora_b = nn.Parameter(torch.zeros(out_dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Run:
    """A run of a small adapted model, with weights drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"up": Adapted(4, 8), "down": Adapted(8, 4)})
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(3, 4)
        (self.model["down"](self.model["up"](x).relu()) - x).square().mean().backward()
        self.optimizer.step()

    def manager(self, folder: Path, base: Path | None, **settings: Any) -> CheckpointManager:
        config = CheckpointConfig(
            enable=True,
            interval=2,
            last_save_model_only=False,
            save_frozen=False,
            initial_load_path=None if base is None else str(base),
            **settings,
        )
        return CheckpointManager(folder, model=self.model, optimizers=self.optimizer, config=config)

    def train(self, folder: Path, base: Path, steps: int, **settings: Any) -> dict[str, Tensor]:
        with self.manager(folder, base, **settings) as manager:
            for step in range(manager.load() + 1, steps + 1):
                self.step()
                manager.save(step, last_step=step == steps)
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.fixture(params=["at the top", "below a key"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of the model before it had adapters."""
    state = {n: t for n, t in Run(0).model.state_dict().items() if n not in TRAINED}
    nested = {"model": state, "step": 7}
    save(tmp_path / "base", state if request.param == "at the top" else nested)
    return tmp_path / "base"


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_a_run_with_adapters_resumes_bit_identically(mode: str, base: Path, tmp_path: Path) -> None:
    """G4: checkpoints hold adapters and their optimizer state, and no byte of the base. A process
    with other initial weights loads the base from its own checkpoint, and the rest from the
    step."""
    whole = Run(1).train(tmp_path / "whole", base, 6, async_mode=mode)
    Run(1).train(tmp_path / "run", base, 3, async_mode=mode)
    manifest = open_manifest(LocalStore(tmp_path / "run"), "step-3")
    flat = {name for name in manifest.tensors if not name.startswith(("optimizer.", "rng."))}
    assert flat == TRAINED
    slots = {name for name in manifest.tensors if name.startswith("optimizer.state.")}
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in slots} == TRAINED
    resumed = Run(2).train(tmp_path / "run", base, 6, async_mode=mode)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_base_may_lack_trained_parameters_only(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G6: adapters that the base lacks are logged. A missing frozen tensor, or one that the model
    does not have, is an error, and nothing is changed."""
    run = Run(3)
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        run.manager(tmp_path / "a", base) as manager,
    ):
        manager.load()
    assert "4 trained parameters are not in" in caplog.text
    state = {n: t for n, t in Run(0).model.state_dict().items() if n not in TRAINED}
    state["other"] = state.pop("up.bias")
    save(tmp_path / "wrong", state)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with (
        run.manager(tmp_path / "b", tmp_path / "wrong") as manager,
        pytest.raises(MismatchError, match="2 differences") as raised,
    ):
        manager.load()
    assert "`up.bias` is not in the checkpoint" in str(raised.value)
    assert all(torch.equal(before[n], t) for n, t in run.model.state_dict().items())


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
@pytest.mark.parametrize("then", ["unfrozen", "frozen", "unfrozen for two steps"])
@pytest.mark.parametrize("resumed_as", [True, False])
def test_parameters_are_saved_whenever_they_were_unfrozen(
    resumed_as: bool, then: str, mode: str, base: Path, tmp_path: Path
) -> None:
    """G15. Method: a layer of the base is unfrozen after the manager was made, or frozen, or
    unfrozen only between two saves. A run with the layer frozen or not resumes bit-identically, and
    saves it again."""
    run = Run(1)
    layer: Any = run.model["up"].weight
    run.optimizer.add_param_group({"params": [layer]})
    layer.requires_grad_(then == "frozen")
    with run.manager(tmp_path / "run", base, async_mode=mode) as manager:
        manager.load()
        for step in range(1, 7):
            if step in (3, 5):
                active = then == "unfrozen" or (then != "frozen" and step == 3)
                layer.requires_grad_(active)
            run.step()
            manager.save(step, last_step=step == 6)
    fresh = Run(2)
    other: Any = fresh.model["up"].weight
    fresh.optimizer.add_param_group({"params": [other]})
    other.requires_grad_(resumed_as)
    with fresh.manager(tmp_path / "run", base, async_mode=mode) as manager:
        assert manager.load() == 6
        assert torch.equal(other, layer)
        assert not torch.equal(other, Run(0).model.state_dict()["up.weight"])
        manager.save(8)
    manifest = open_manifest(LocalStore(tmp_path / "run"), "step-8")
    assert "up.weight" in manifest.tensors
    assert "up.bias" not in manifest.tensors, "the base has it"


def test_a_layer_unfrozen_before_a_resume_is_loaded_from_the_base(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G15. Method: the checkpoints were saved while the layer was frozen, and the next process
    unfreezes it before it loads. Without a base the load is refused."""
    Run(1).train(tmp_path / "run", base, 2)
    run = Run(2)
    run.model.get_parameter("up.weight").requires_grad_(True)
    with (
        caplog.at_level(logging.WARNING, "holdfast"),
        run.manager(tmp_path / "run", base) as manager,
    ):
        assert manager.load() == 2
    assert torch.equal(run.model.state_dict()["up.weight"], Run(0).model.state_dict()["up.weight"])
    assert "1 trained parameters are not in" in caplog.text
    with run.manager(tmp_path / "run", None) as manager, pytest.raises(MismatchError):
        manager.load(2)


def test_a_run_does_not_start_from_the_base_if_all_steps_are_damaged(
    base: Path, tmp_path: Path
) -> None:
    """G5: adapters that were loaded in part are not taken for fresh ones. Method: every data file
    gets other bytes."""
    Run(1).train(tmp_path / "run", base, 3)
    for file in (tmp_path / "run").glob("step-*/*.distcp"):
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    with (
        Run(2).manager(tmp_path / "run", base) as manager,
        pytest.raises(NotFoundError, match="can be resumed from"),
    ):
        manager.load()


def test_a_base_may_be_a_hugging_face_folder(tmp_path: Path) -> None:
    """Method: the base comes from a Hugging Face folder at the start and at the resume, the adapter
    from the step."""
    flavor = MODELS["llama3"]["debugmodel"]
    config = config_of("llama3", flavor, 64)
    folder = save_folder(tmp_path / "hf", config, hf_tensors(config))
    found = []
    for value in (1.0, 2.0):
        model = Transformer(flavor, vocab_size=64, seq_len=8).requires_grad_(False)
        model.adapter = nn.Parameter(torch.full((3,), value))
        settings = CheckpointConfig(
            enable=True,
            interval=1,
            save_frozen=False,
            initial_load_in_hf=True,
            initial_load_path=str(folder),
        )
        with CheckpointManager(
            tmp_path / "run", model=model, config=settings, hub=HFModel(config)
        ) as manager:
            if manager.load() == 0:
                manager.save(1)
        found.append(model.state_dict())
    assert torch.equal(found[1]["adapter"], torch.full((3,), 1.0))
    wanted = hf_tensors(config)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found[1]["layers.1.feed_forward.w3.weight"], wanted)


def test_settings_that_need_the_whole_model_are_refused() -> None:
    """G6: exports and seeds would need the base."""
    for settings in ({"last_save_in_hf": True}, {"hf_export_interval": 5}):
        wanted: dict[str, Any] = {"enable": True, "save_frozen": False, **settings}
        with pytest.raises(UsageError, match="writes a whole model"):
            CheckpointConfig(**wanted)
    with pytest.raises(UsageError, match="initial_load_model_only"):
        CheckpointConfig(enable=True, save_frozen=False, initial_load_model_only=False)


def test_a_rank_may_hold_only_frozen_parameters(tmp_path: Path) -> None:
    """G9: as a pipeline stage without adapters does. Method: two ranks as threads, one stage each,
    and a second run of both."""
    save(tmp_path / "base", {"first.weight": torch.ones(2, 2), "last.weight": torch.ones(2, 2)})

    def run(ranks: Ranks) -> dict[str, Tensor]:
        name = ("first", "last")[ranks.rank]
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False)}).requires_grad_(False)
        if name == "last":
            model["adapter"] = nn.Linear(2, 2, bias=False)
        config = CheckpointConfig(
            enable=True, interval=1, save_frozen=False, initial_load_path=str(tmp_path / "base")
        )
        with CheckpointManager(
            tmp_path / "run", model=model, config=config, ranks=ranks
        ) as manager:
            if manager.load() == 0:
                manager.save(1)
        return dict(model.state_dict())

    _, saved = run_ranks(2, run)
    first, found = run_ranks(2, run)
    assert torch.equal(first["first.weight"], torch.ones(2, 2))
    assert torch.equal(found["last.weight"], torch.ones(2, 2))
    assert torch.equal(found["adapter.weight"], saved["adapter.weight"])
