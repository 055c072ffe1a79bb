"""Starting from weights that fit in part, or have other names."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from hf_folders import hf_tensors, save_folder
from holdfast.comm import Ranks
from holdfast.errors import MismatchError, UsageError
from holdfast.format.manifest import Manifest, TensorEntry
from holdfast.hf.dialects import renamed
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import MODELS, config_of
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.initial import find_nested
from holdfast.manager.manager import CheckpointManager
from holdfast.manager.renames import rename
from holdfast.saving.save import save
from holdfast.state.model import ModelState
from holdfast.testing.ranks import run_ranks
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


def test_a_partial_start_that_matches_nothing_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G6, G11: otherwise the run would train from random weights. Method: a prefix that a rule
    drops, names of another model, and a Hugging Face folder of another model."""
    model = nn.Linear(4, 4)
    save(tmp_path / "prefix", {f"net.{n}": t.clone() for n, t in model.state_dict().items()})
    save(tmp_path / "other", {"a": torch.ones(1), "b": torch.ones(2)})
    save_folder(tmp_path / "hf", {"model_type": "unknown"}, {"a": torch.ones(1)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hints = {"prefix": '`initial_load_renames = ["net="]`', "other": "another model?"}
    for name, hint in hints.items():
        path: dict[str, Any] = {"initial_load_path": str(tmp_path / name)}
        with pytest.raises(
            MismatchError, match="no tensor of this model, so nothing was"
        ) as raised:
            started(tmp_path / "run", model, **path, initial_load_strict=False)
        assert "`weight` is not in the checkpoint" in raised.value.what
        assert hint in str(raised.value.hint)
    with pytest.raises(MismatchError) as raised:
        started(tmp_path / "run", model, initial_load_path=str(tmp_path / "prefix"))
    assert hints["prefix"] in str(raised.value.hint), "a strict start has the same hint"
    hf: dict[str, Any] = {"initial_load_in_hf": True, "initial_load_strict": False}
    with pytest.raises(MismatchError, match="no tensor of this model") as raised:
        started(tmp_path / "run", model, initial_load_path=str(tmp_path / "hf"), **hf)
    assert "--rename" in str(raised.value.hint)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert "entries matched" not in caplog.text


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


class WithExtra(nn.Module):
    """A model with extra state, beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.extra: dict[str, Any] = {"kept": (1, 2)}

    def get_extra_state(self) -> dict[str, Any]:
        return self.extra

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
@pytest.mark.parametrize("program", ["holdfast", "holdfast, plain", "dcp"])
def test_a_model_below_a_key_starts_a_run(
    program: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G6, G10: as scripts save it, beside an optimizer and a step. The log says which key was
    taken, and what was left."""
    saved, path = WithExtra(), tmp_path / "weights"
    saved.extra = {"kept": (3, 4)}
    optimizer = torch.optim.AdamW(saved.parameters())
    state = {"optimizer": optimizer.state_dict(), "step": 7, "best": torch.ones(1)}
    if program == "dcp":
        stock_save({key: saved.state_dict(), **state}, checkpoint_id=path)
    else:
        save(path, {key: saved if program == "holdfast" else saved.state_dict(), **state})
    model = WithExtra()
    with caplog.at_level(logging.INFO, "holdfast"):
        started(tmp_path / "run", model, initial_load_path=str(path))
    found = model.state_dict()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(found[name], tensor) if name != "_extra_state" else found[name] == tensor
    assert f"{path}, below its key `{key}`, ignoring `best`, `optimizer`, `step`" in caplog.text


def test_a_key_is_not_dropped_from_a_model_that_fits_with_it_or_in_part(tmp_path: Path) -> None:
    """G6. Method: a model that has a module `model`; a checkpoint that lacks a tensor, which a
    strict start refuses, with the rule that drops the key. Rules apply to the whole names. A start
    that is not strict finds the key."""
    inner = nn.Linear(4, 4)
    nested = nn.ModuleDict({"model": inner, "head": nn.Linear(4, 4)})
    save(tmp_path / "whole", nested)
    started(tmp_path / "run", nested, initial_load_path=str(tmp_path / "whole"))
    save(tmp_path / "part", {"model": {"weight": torch.zeros(4, 4)}, "step": 7})
    path: dict[str, Any] = {"initial_load_path": str(tmp_path / "part")}
    with pytest.raises(MismatchError) as raised:
        started(tmp_path / "other", inner, **path)
    assert '`initial_load_renames = ["model="]`' in str(raised.value.hint)
    rules: dict[str, Any] = {"initial_load_renames": ("model=",)}
    for settings in (rules, {}):
        nn.init.ones_(inner.weight)
        started(tmp_path / "other", inner, **path, **settings, initial_load_strict=False)
        assert not inner.weight.any()


def test_stages_of_a_pipeline_agree_on_the_key(tmp_path: Path) -> None:
    """G6. Method: two ranks with one layer each; with a rank that has no layer, or one that the
    checkpoint lacks."""
    whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save(tmp_path / "weights", {"model": whole, "step": 7})

    manifest = holdfast.open(tmp_path / "weights").manifest
    first, second = (nn.Sequential(OrderedDict({str(n): whole[n]})) for n in range(2))

    def keys(*stages: nn.Module) -> list[str | None]:
        def find(ranks: Ranks) -> str | None:
            found = find_nested(manifest, ModelState([stages[ranks.rank]]), ranks, partial=False)
            return None if found is None else found.key

        return run_ranks(2, find)

    assert keys(first, second) == ["model", "model"]
    assert keys(first, nn.Sequential()) == ["model", "model"]
    assert keys(first, nn.Sequential(OrderedDict({"2": whole[1]}))) == [None, None]
    assert keys(nn.Sequential(), nn.Sequential()) == [None, None]


def test_a_checkpoint_in_torchtitans_dialect_starts_a_run_in_metas(tmp_path: Path) -> None:
    """G10: a model saved under TorchTitan 0.3's tensor names."""
    torch.manual_seed(4)
    saved = Transformer(FLAVOR, vocab_size=64, seq_len=8).state_dict()
    called = renamed([*saved], "titan")
    titan = {called[name]: tensor for name, tensor in saved.items()}
    save(tmp_path / "titan", titan)
    save(tmp_path / "below", {"model": titan, "step": 7})
    assert "lm_head.weight" in called.values()
    for folder in ("titan", "below"):
        model = Transformer(FLAVOR, vocab_size=64, seq_len=8)
        started(tmp_path / f"run-{folder}", model, initial_load_path=str(tmp_path / folder))
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
