"""Power cuts at every operation of Hugging Face exports, and the next start after each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.power_cuts import cuts, fingerprint
from benchmarks.recording import (
    merged,
    recorded_folder,
    tree_after,
    tree_at,
    write_tree,
)
from safetensors.torch import load_file
from torch import nn

from crashes import SEEDS
from extent import some
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.comm import Ranks
from holdfast.hf.export import HFModel
from holdfast.testing.ranks import run_ranks

HF_MODEL = HFModel(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
)


def model_of(value: float) -> nn.Module:
    """Make the model of `HF_MODEL` with every weight equal to `value`."""
    root = nn.Module()
    for name in HF_MODEL.mapping.names("native"):
        *above, last = name.split(".")
        module = root
        for part in above:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        weight = torch.full(HF_MODEL.mapping.shape("native", name), value)
        module.register_parameter(last, nn.Parameter(weight))
    return root


def manager(folder: Path, model: nn.Module, ranks: Ranks | None, **settings: Any) -> Any:
    config = CheckpointConfig(
        enable=True, interval=1, hf_export_interval=1, last_save_in_hf=True, **settings
    )
    return CheckpointManager(folder, model=model, hub=HF_MODEL, config=config, ranks=ranks)


def values_in(folder: Path) -> set[float]:
    """Return the distinct values of all weights in a Hugging Face folder, which must be
    complete."""
    tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    assert tensors.keys() == set(HF_MODEL.mapping.names("hf"))
    assert (folder / "config.json").read_text().startswith("{")
    return {value for tensor in tensors.values() for value in torch.unique(tensor).tolist()}


def look(folder: Path) -> tuple[tuple[str, float], ...]:
    """Start again, and return every checkpoint with the one value of its weights."""
    model = model_of(0.0)
    with manager(folder, model, None) as held:
        step = held.load()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert weights.unique().tolist() == [float(step)]  # type: ignore[no-untyped-call]
    found = []
    for path in (*folder.glob("step-*"), *folder.glob("hf/*")):
        if path.parent != folder or not (path / "manifest.json").exists():
            (value,) = values_in(path)
            assert float(path.name.removeprefix("step-")) == value
            found.append((str(path.relative_to(folder)), value))
    assert not [path for path in folder.rglob(".*") if path.is_dir()], "nothing is left aside"
    return tuple(sorted(found))


@pytest.mark.parametrize(
    ("size", "async_mode"),
    [(1, "disabled"), (1, "async"), pytest.param(2, "async", marks=pytest.mark.slow)],
)
def test_an_export_is_complete_or_absent(size: int, async_mode: str, tmp_path: Path) -> None:
    """G1, G2, G14. Method: every cut of a step with an export, of both saved again, and of a last
    step that is an export, by real file operations."""
    root, cut_folder = tmp_path / "root", tmp_path / "cut"
    root.mkdir()

    def work(ranks: Ranks) -> None:
        model = model_of(1.0)
        with manager(root, model, ranks, async_mode=async_mode) as held:
            for step in (1, 1, 2):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.fill_(step)
                held.save(step, last_step=step == 2)
                held.wait()

    with recorded_folder(root) as done:
        run_ranks(size, work)
    operations = merged([done])
    assert tree_after(operations) == tree_at(root)
    seen: dict[int, tuple[tuple[str, float], ...]] = {}
    for cut, tree in cuts(operations, seeds=some(SEEDS, 1)):
        if (state := fingerprint(tree)) in seen:
            continue
        write_tree(tree, cut_folder)
        try:
            seen[state] = look(cut_folder)
        except BaseException as error:
            error.add_note(str(cut))
            raise
        shutil.rmtree(cut_folder)
    beside, last = ("hf/step-1", 1.0), ("step-2", 2.0)
    assert set(seen.values()) == {(), (beside,), (beside, last)}
