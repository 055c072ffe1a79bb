"""Starting from weights that fit in part, or have other names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_folders import hf_tensors, save_folder
from holdfast.errors import MismatchError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.hf.dialects import renamed
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import MODELS, config_of
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.renames import rename
from holdfast.saving.save import save
from holdfast.trainer.model import Transformer

FLAVOR = replace(MODELS["llama3"]["debugmodel"], dim=32, num_layers=2, hidden_dim=48)
CONFIG = config_of("llama3", FLAVOR, 64)


def started(folder: Path, model: nn.Module, hub: HFModel | None = None, **settings: Any) -> None:
    config = CheckpointConfig(enable=True, **settings)
    with CheckpointManager(folder, model=model, config=config, hub=hub) as manager:
        assert manager.load() == 0


def test_a_partial_start_loads_matching_tensors_and_logs_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G6: a head of another size, an extra tensor, a missing tensor. A strict load
    changes nothing. A partial one leaves the head as it is, and the log lists every difference."""
    saved = {"body.weight": torch.randn(4, 4), "head.weight": torch.randn(9, 4)}
    save(tmp_path / "weights", {**saved, "old": torch.ones(2)})
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3, bias=False)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path: dict[str, Any] = {"initial_load_path": str(tmp_path / "weights")}
    with pytest.raises(MismatchError, match="3 differences"):
        started(tmp_path / "run", model, **path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with caplog.at_level(logging.WARNING, "holdfast"):
        started(tmp_path / "run", model, **path, initial_load_strict=False)
    found = model.state_dict()
    assert torch.equal(found["body.weight"], saved["body.weight"])
    assert torch.equal(found["body.bias"], before["body.bias"])
    assert torch.equal(found["head.weight"], before["head.weight"])
    for line in (
        "`body.bias` is not in the checkpoint",
        "`head.weight` has shape [9, 4] in the checkpoint, expected [3, 4]",
        "`old` is in the checkpoint, but not wanted",
        "1 entries matched, 3 differ and stay as they are",
    ):
        assert line in caplog.text


def test_a_partial_start_from_a_hugging_face_folder(tmp_path: Path) -> None:
    """Method: a folder of three layers into a model of two."""
    larger = {**CONFIG, "num_hidden_layers": 3}
    folder = save_folder(tmp_path / "hf", larger, hf_tensors(larger))
    settings = {"initial_load_in_hf": True, "initial_load_path": str(folder)}
    model = Transformer(FLAVOR, vocab_size=64, seq_len=8)
    with pytest.raises(MismatchError):
        started(tmp_path / "run", model, HFModel(CONFIG), **settings)
    started(tmp_path / "run", model, HFModel(CONFIG), **settings, initial_load_strict=False)
    wanted = hf_tensors(larger)["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(model.state_dict()["layers.1.feed_forward.w3.weight"], wanted)


def test_renames_apply_to_initial_weights(tmp_path: Path) -> None:
    """Method: a prefix is dropped, a part of each layer's name replaced, another name replaced as a
    whole."""
    saved = {f"net.blocks.{n}.lin.weight": torch.randn(2, 2) for n in range(2)}
    save(tmp_path / "weights", {**saved, "net.out": torch.randn(2)})
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    model.scale = nn.Parameter(torch.zeros(2))
    rules = ("net.blocks.{}.lin=layers.{}", "net.out=scale")
    started(
        tmp_path / "run",
        model,
        initial_load_path=str(tmp_path / "weights"),
        initial_load_renames=rules,
    )
    found = model.state_dict()
    assert torch.equal(found["layers.1.weight"], saved["net.blocks.1.lin.weight"])
    assert found["scale"].abs().sum() > 0


def test_a_checkpoint_in_torchtitans_dialect_starts_a_run_in_metas(tmp_path: Path) -> None:
    """G10: a model saved under TorchTitan 0.3's tensor names."""
    torch.manual_seed(4)
    saved = Transformer(FLAVOR, vocab_size=64, seq_len=8).state_dict()
    called = renamed([*saved], "titan")
    save(tmp_path / "titan", {called[name]: tensor for name, tensor in saved.items()})
    assert "lm_head.weight" in called.values()
    model = Transformer(FLAVOR, vocab_size=64, seq_len=8)
    started(tmp_path / "run", model, initial_load_path=str(tmp_path / "titan"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        (("a",), "same number of"),
        (("a.{}=b",), "same number of"),
        (("x=y",), "no tensor matches"),
        (("a=c", "b=c"), "two tensors the name `c.w`"),
    ],
)
def test_invalid_renames_are_refused(rules: tuple[str, ...], error: str) -> None:
    entry = TensorEntry("float32", (1,), (), ("w",))
    with pytest.raises(UsageError, match=error):
        rename(Manifest({"a.w": entry, "b.w": entry}, {}), rules)


def test_a_prefix_is_dropped_by_an_empty_name() -> None:
    entry = TensorEntry("float32", (1,), (), ("model", "a"))
    found = rename(Manifest({"model.a": entry, "models": entry}, {}), ["model="]).tensors
    assert [*found] == ["a", "models"]
    assert found["a"].path == ("a",)
