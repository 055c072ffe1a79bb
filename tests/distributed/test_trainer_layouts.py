"""Every layout trains the model that one process trains.

This file is also the program that the tests start: `python test_trainer_layouts.py OUT` forks four
ranks, which try one layout after the other in the same process group.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from holdfast.trainer.arguments import read_config
from holdfast.trainer.config import Config
from holdfast.trainer.flavors import MODELS, Flavor
from holdfast.trainer.optim import build_optimizers, clip_gradients
from holdfast.trainer.parallel import Place, build_model, mean_over_data, whole
from holdfast.trainer.train import accumulate_gradients

WORLD_SIZE = 4
LAYOUTS = [(4, 1, "small"), (2, 2, "small"), (1, 4, "small"), (2, 2, "tied"), (4, 1, "recompute")]
"""Data-parallel degree, tensor-parallel degree, and what the model is."""

VOCAB_SIZE = 130
"""Not divided by 4: rows of the embedding are shared unevenly."""

SMALL = Flavor(64, 2, 8, 4, 96, vocab_size=VOCAB_SIZE)

STEPS = 3


def config_of(kind: str) -> Config:
    """A tiny run with plain SGD: AdamW would hide a gradient of the wrong scale."""
    recompute = "full" if kind == "recompute" else "none"
    return read_config(
        f"--model.flavor {'tied' if kind == 'tied' else 'small'} --optimizer.name SGD "
        "--optimizer.lr 0.2 --optimizer.weight_decay 0 --training.seq_len 16 --training.seed 3 "
        "--training.local_batch_size 1 --training.global_batch_size 8 "
        f"--training.max_norm 0.5 --activation_checkpoint.mode {recompute}".split()
    )


def trained(place: Place, kind: str) -> dict[str, Any]:
    """The weights before, the losses and norms of some steps, and the weights after. Collective."""
    config = config_of(kind)
    (model,) = build_model(config, place, VOCAB_SIZE)
    (optimizer,) = build_optimizers([model], config.optimizer)
    before, reports = whole_weights(model), []
    share = config.training.batch_per_rank(place.dp_size)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(VOCAB_SIZE, (8, 17), generator=generator)
        mine = batch[place.dp_rank * share : (place.dp_rank + 1) * share]
        loss = accumulate_gradients(config, place, [model], mine[:, :-1], mine[:, 1:])
        norm = clip_gradients([model], config.training.max_norm, place)
        optimizer.step()
        optimizer.zero_grad()
        reports.append((mean_over_data(loss, place), norm.item()))
    return {"before": before, "reports": reports, "after": whole_weights(model)}


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model, gathered. Collective."""
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def add_flavors() -> None:
    """Make the tiny models known by name, in this process alone."""
    MODELS["llama3"]["small"] = SMALL
    MODELS["llama3"]["tied"] = replace(SMALL, tied=True)


def run_rank(rank: int, out: Path) -> None:
    """Try every layout as one of the ranks; rank 0 writes what came of it."""
    dist.init_process_group("gloo")
    add_flavors()
    for number, (dp, tp, kind) in enumerate(LAYOUTS):
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp_shard", "tp"))
        result = trained(Place(rank, WORLD_SIZE, torch.device("cpu"), mesh), kind)
        if rank == 0:
            torch.save(result, out / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path) -> int:
    """Fork the ranks: importing torch is most of what starting a process costs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                facts = {"RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_PORT": port}
                os.environ |= {key: str(value) for key, value in facts.items()}
                run_rank(rank, out)
                status = 0
            except Exception:
                sys.excepthook(*sys.exc_info())
                raise
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each layout came to, all from one start of the ranks."""
    out = tmp_path_factory.mktemp("layouts")
    surroundings = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(out)],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, dict[str, Any]]]:
    """What one process comes to, by kind of model."""
    known = dict(MODELS["llama3"])
    add_flavors()
    place = Place(0, 1, torch.device("cpu"))
    yield {kind: trained(place, kind) for _, _, kind in LAYOUTS}
    MODELS["llama3"].clear()
    MODELS["llama3"].update(known)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_a_layout_starts_from_and_arrives_at_what_one_process_does(
    number: int, results: Path, alone: dict[str, dict[str, Any]]
) -> None:
    """Method: weights equal bit by bit before, losses, norms and weights to 1e-5 after some SGD."""
    found = torch.load(results / f"{number}.pt")
    expected = alone[LAYOUTS[number][2]]
    assert found["before"].keys() == expected["before"].keys()
    for name, weight in expected["before"].items():
        assert torch.equal(found["before"][name], weight), name
    for one, other in zip(found["reports"], expected["reports"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    for name, weight in expected["after"].items():
        torch.testing.assert_close(found["after"][name], weight, atol=1e-5, rtol=0)
        assert not torch.equal(weight, expected["before"][name]), name


def launched(folder: Path, *arguments: str, workers: int = 2) -> subprocess.CompletedProcess[str]:
    """A real run of a few short steps, as `run_train.sh` starts it."""
    text = folder.parent / "text.txt"
    text.write_text(Path(__file__).read_text())
    command = (
        f"{sys.executable} -W error -m holdfast.trainer.launch --job.dump_folder {folder} "
        f"--training.dataset_path {text} --training.seq_len 32 "
        "--training.local_batch_size 1 --training.global_batch_size 4 --metrics.log_freq 1 "
        "--checkpoint.enable --checkpoint.interval 3 --lr_scheduler.total_steps 6 "
        "--lr_scheduler.warmup_steps 1 --checkpoint.no-last_save_model_only"
    )
    return subprocess.run(
        [*command.split(), *arguments],
        env=os.environ | {"NGPU": str(workers)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step; the last row of a step counts."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def test_a_run_resumes_exactly_and_on_other_layouts(tmp_path: Path) -> None:
    """Method: six steps at once; three and three more; and three more with tensor parallel."""
    whole_run, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    assert launched(whole_run, "--training.steps", "6").returncode == 0
    assert launched(parts, "--training.steps", "3").returncode == 0
    other.symlink_to(parts)
    done = launched(parts, "--training.steps", "6")
    assert done.returncode == 0, done.stderr
    assert losses(parts) == losses(whole_run)
    tensor_parallel = ("--parallelism.tensor_parallel_degree", "2", "--checkpoint.load_step", "3")
    done = launched(other, "--training.steps", "5", *tensor_parallel, "--checkpoint.load_only")
    assert done.returncode == 0, done.stderr
    assert "training from step 3 to 5" in done.stdout
    for step, loss in losses(other).items():
        assert loss == pytest.approx(losses(whole_run)[step], abs=1e-4)
    done = launched(parts, "--training.steps", "6")
    assert (done.returncode, done.stderr) == (0, "")
    assert "already at step 6 of 6: nothing to do" in done.stdout
    assert "step 4" not in done.stdout
    done = launched(parts, "--training.steps", "7", "--training.seed", "1")
    assert done.returncode == 6
    assert done.stderr.count("error: ") == 1
    assert "`seed` is 0 in the checkpoint and 1 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_setting_is_reported_once_before_workers_start(tmp_path: Path) -> None:
    """Method: a misspelt key; the status is that of the error."""
    done = launched(tmp_path, "--training.step", "6")
    assert done.returncode == 2
    assert done.stderr.startswith("error: `--training.step`: key `training.step` is not known\n")
    assert done.stderr.count("error: ") == 1
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
