"""Stock tools read checkpoints of Holdfast, and Holdfast reads stock checkpoints."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from runs import train


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a real run of 2 ranks: step 2 is full, step 3 is model-only."""
    folder = tmp_path_factory.mktemp("run")
    done = train(
        "--training.steps",
        "3",
        "--checkpoint.interval",
        "2",
        "--checkpoint.last_save_model_only",
        "--checkpoint.export_dtype",
        "bfloat16",
        ranks=2,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout
    return folder / "outputs/checkpoint"


def converted(step: Path, target: Path) -> dict[str, Any]:
    """Convert a checkpoint by stock `dcp_to_torch`, and load the result."""
    module = "torch.distributed.checkpoint.format_utils"
    subprocess.run(
        [sys.executable, "-m", module, "dcp_to_torch", str(step), str(target)],
        check=True,
        capture_output=True,
    )
    loaded: dict[str, Any] = torch.load(target, weights_only=True)
    return loaded


def test_dcp_to_torch_converts_a_full_checkpoint(steps: Path, tmp_path: Path) -> None:
    """G10: every tensor has the same bits. Method: run the conversion command of torch's
    documentation."""
    loaded = converted(steps / "step-2", tmp_path / "checkpoint.pt")
    ours = holdfast.open(steps / "step-2")
    for name, entry in ours.tensors.items():
        value: Any = loaded
        for key in entry.path:
            value = value[key]
        assert torch.equal(value, ours.read(name)), name
    assert loaded["lr_scheduler"]["last_epoch"] == 2
    assert loaded["train_state"]["step"] == 2


def test_weights_only_opens_a_converted_model_only_checkpoint(steps: Path, tmp_path: Path) -> None:
    """G10: the file is a flat dict with Meta's names and the export dtype."""
    loaded = converted(steps / "step-3", tmp_path / "model.pt")
    assert loaded["layers.0.attention.wq.weight"].dtype == torch.bfloat16
    assert set(loaded) == set(holdfast.open(steps / "step-3").names())


def test_stock_load_reads_a_checkpoint_bit_for_bit(steps: Path) -> None:
    """G10. Method: call `dcp.load` with tensors that have other elements."""
    ours = holdfast.open(steps / "step-2")
    state = {
        name: torch.full(entry.shape, 7, dtype=getattr(torch, entry.dtype))
        for name, entry in ours.tensors.items()
        if len(entry.path) == 1
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_load(state, checkpoint_id=steps / "step-2")
    assert len(state) > 50
    for name, tensor in state.items():
        assert torch.equal(tensor, ours.read(name)), name


def test_the_manager_resumes_from_a_stock_checkpoint(tmp_path: Path) -> None:
    """G10: the manager skips a damaged newest checkpoint, resumes from the one before, and saves
    into the same folder. Method: write stock DCP checkpoints, flattened like TorchTitan's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    torch.manual_seed(0)
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (5, 6):
            stock_save({**weights, "optimizer": moments}, checkpoint_id=tmp_path / f"step-{step}")
    data = tmp_path / "step-6/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])

    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    config = holdfast.CheckpointConfig(enable=True, interval=1)
    with holdfast.CheckpointManager(
        tmp_path, model=other, optimizers=fresh, config=config
    ) as manager:
        assert manager.load() == 5
        assert torch.equal(other.weight, model.weight)
        assert fresh.param_groups[0]["lr"] == 0.5
        moment = fresh.state[other.weight]["exp_avg"]
        assert torch.equal(moment, optimizer.state[model.weight]["exp_avg"])
        assert manager.save(7)
    assert holdfast.open(tmp_path / "step-7").manifest.kind == "full"


def test_a_flipped_bit_in_a_stock_checkpoint_is_found(tmp_path: Path) -> None:
    """G3. Method: flip a bit. The CRC-32 that stock DCP writes, and never reads, finds it."""
    state = {"weight": torch.arange(1000.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save(state, checkpoint_id=tmp_path / "stock")
    data = bytearray((tmp_path / "stock/__0_0.distcp").read_bytes())
    at = data.index(state["weight"].numpy().tobytes())
    data[at + 2000] ^= 1
    (tmp_path / "stock/__0_0.distcp").write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_load({"weight": torch.zeros(1000)}, checkpoint_id=tmp_path / "stock")
    with pytest.raises(holdfast.DamagedError, match="`weight` has CRC-32"):
        holdfast.load(tmp_path / "stock", {"weight": torch.zeros(1000)})
