"""TorchTitan's biases that balance experts. Most families have no Hugging Face tensor for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_folders import hf_tensors, save_folder
from holdfast.comm import all_ranks
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import MismatchError
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import MODELS, config_of
from holdfast.hf.load import load_folder
from holdfast.loading.checkpoint import open_checkpoint
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.saving.save import save
from holdfast.state.objects import StateTree

CONFIG = {**config_of("qwen3_moe", MODELS["qwen3_moe"]["debugmodel"], 64), "num_hidden_layers": 2}
BIASES = [f"layers.{n}.moe.expert_bias_E" for n in (0, 1)]


def converted(source: Path, target: Path, **options: Any) -> tuple[str, ...]:
    parsed = ConvertOptions(**options)
    planned = plan(str(source), parsed)
    convert(planned, str(target))
    return planned.notes


def state_of(step: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(step)
    return {name: opened.read(name) for name in opened.tensors}


def test_zero_biases_are_added_for_torchtitan_and_dropped_for_hugging_face(
    tmp_path: Path,
) -> None:
    """G10: conversion to TorchTitan's names adds zeros beside every router. Conversion to Hugging
    Face drops zeros with a note, and refuses others. Method: from Hugging Face and Meta's names."""
    source = save_folder(tmp_path / "hf", CONFIG, hf_tensors(CONFIG))
    converted(source, tmp_path / "meta", to="dcp")
    assert not any("expert_bias" in name for name in state_of(tmp_path / "meta"))
    for origin in ("hf", "meta"):
        step = tmp_path / f"titan-{origin}"
        converted(tmp_path / origin, step, to="dcp", names="titan")
        state = state_of(step)
        assert [name for name in state if "expert_bias" in name] == BIASES
        assert all(torch.equal(state[name], torch.zeros(8)) for name in BIASES)
        notes = converted(step, tmp_path / f"back-{origin}", to="hf", hf_assets=str(source))
        assert "left out 2 biases that balance experts, all zero" in notes
    state[BIASES[1]][3] = 0.5
    save(tmp_path / "trained", state)
    with pytest.raises(MismatchError, match="1 differences") as raised:
        plan(str(tmp_path / "trained"), ConvertOptions(to="hf", hf_assets=str(source)))
    assert f"`{BIASES[1].removesuffix('_E')}` is not zero" in str(raised.value)
    skip = ("*.expert_bias_E",)
    converted(tmp_path / "trained", tmp_path / "out", to="hf", hf_assets=str(source), skip=skip)


def module_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module with this state dict."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *above, last = name.split(".")
        at = root
        for part in above:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(last, tensor.clone())
    return root


def test_an_export_drops_zero_biases_and_logs_nonzero_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G10: an export drops biases that are zero. It logs others, and the run continues. A tensor
    that is not in the configuration is an error."""
    source = save_folder(tmp_path / "hf", CONFIG, hf_tensors(CONFIG))
    converted(source, tmp_path / "titan", to="dcp", names="titan")
    model = module_of(state_of(tmp_path / "titan"))
    settings = CheckpointConfig(enable=True, interval=100, hf_export_interval=1)
    with CheckpointManager(
        tmp_path / "run", model=model, config=settings, hub=HFModel(CONFIG)
    ) as manager:
        manager.save(1)
        assert not caplog.records
        model.get_buffer(BIASES[1])[3] = 0.5
        manager.save(2)
        (warned,) = (record.getMessage() for record in caplog.records)
        assert f"is without `{BIASES[1]}`, which balance experts and are not zero" in warned
        exported = [load_file(tmp_path / f"run/hf/step-{n}/model.safetensors") for n in (1, 2)]
        assert exported[0].keys() == exported[1].keys() == hf_tensors(CONFIG).keys()
        model.get_submodule("layers.1").register_buffer("adapter", torch.ones(2))
        with pytest.raises(MismatchError, match=r"`layers\.1\.adapter` is unexpected"):
            manager.save(3)
    assert {path.name for path in (tmp_path / "run/hf").iterdir()} == {"step-1", "step-2"}


def test_loading_a_hugging_face_folder_sets_balancing_biases_to_zero(tmp_path: Path) -> None:
    """G10: the folder has no such biases, the state has TorchTitan's names."""
    source = save_folder(tmp_path / "hf", CONFIG, hf_tensors(CONFIG))
    converted(source, tmp_path / "titan", to="dcp", names="titan")
    wanted = state_of(tmp_path / "titan")
    state = {name: torch.full_like(tensor, 7) for name, tensor in wanted.items()}
    ranks = all_ranks()
    load_folder(str(source), StateTree(state), ranks=ranks)
    ranks.close()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
