"""`holdfast.hosts.torchtitan` with the components of TorchTitan 0.3.0, on CPU processes: see
`titan.py`."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.errors import DamagedError, NotFoundError, StorageError
from holdfast.storage.cloud import CloudBucket
from processes import Job, run_processes
from s3_server import s3_server
from titan import Lines, Trainer, run, steps_in, whole

if find_spec("torchtitan") is None:
    pytest.skip("TorchTitan is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """State of a run that was never interrupted, after step 5."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        state: dict[str, Any] = run_processes(2, run, folder, 5, {"stock": True})[0][1]
    return state


# -------------------------------------------------------------------------------------- saves


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_each_mode_saves_what_stock_loads_and_the_other_way_round(
    tmp_path: Path, expected: dict[str, Any], mode: str
) -> None:
    """Two steps by us, two by stock, one by us: the state of the run that stock did alone."""
    run_processes(2, run, str(tmp_path), 2, {"async_mode": mode})
    assert steps_in(tmp_path) == ["step-1", "step-2"]
    assert not holdfast.check(tmp_path / "saved/step-2")
    assert (tmp_path / "saved/step-2/manifest.json").exists()
    resumed = run_processes(2, run, str(tmp_path), 4, {"stock": True})
    assert [step for step, _, _ in resumed] == [2, 2]
    resumed = run_processes(2, run, str(tmp_path), 5, {"async_mode": mode})
    assert [step for step, _, _ in resumed] == [4, 4]
    assert resumed[0][1] == expected


def kill(fd: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(rank: int, size: int, folder: str, mode: str) -> None:
    """Rank 1 is killed when it has written its file of step 3, and is about to sync it."""
    warnings.simplefilter("ignore")

    def arm(step: int) -> None:
        trainer.manager.maybe_wait_for_saving()
        if step == 3 and rank == 1:
            os.fsync = kill

    trainer = Trainer(folder, async_mode=mode)
    trainer.train(4, arm)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_killed_while_it_saves_resumes_from_the_save_before(
    tmp_path: Path, expected: dict[str, Any], mode: str
) -> None:
    with Job(2, die_while_saving, str(tmp_path), mode) as job:
        deadline = time.monotonic() + 100
        while job.statuses()[1] is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job.statuses()[1] == -signal.SIGKILL
        job.kill([0])
    step_1, step_2, *rest = sorted(steps_in(tmp_path), key=lambda name: (name[0] == ".", name))
    assert (step_1, step_2) == ("step-1", "step-2")
    assert all(name.startswith((".attempt-step-3-", ".removing-step-3-")) for name in rest)
    resumed = run_processes(2, run, str(tmp_path), 5, {})
    assert [step for step, _, _ in resumed] == [2, 2]
    assert resumed[0][1] == expected
    assert steps_in(tmp_path) == [f"step-{step}" for step in range(1, 6)]


def fill_the_disk(rank: int, size: int, folder: str) -> str:
    """Rank 1 cannot write its file of step 3, and deletes the folder before rank 0 looks for it.
    The next save succeeds."""
    warnings.simplefilter("ignore")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    is_late = False

    def be_late(event: str, _: object) -> None:
        if is_late and event == "os.scandir":
            time.sleep(0.2)

    def limit(step: int) -> None:
        nonlocal is_late
        is_late = step == 3 and rank == 0
        if step == 3 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    sys.addaudithook(be_late)
    trainer = Trainer(folder)
    with pytest.raises(StorageError) as raised:
        trainer.train(4, limit)
    is_late = False
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torch.distributed.barrier()
    assert steps_in(Path(folder)) == ["step-1", "step-2"]
    trainer.manager.save(3)
    trainer.close()
    return str(raised.value)


def test_a_full_disk_is_an_error_on_all_ranks_and_costs_one_save(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    messages = run_processes(2, fill_the_disk, str(tmp_path))
    assert all("File too large" in message for message in messages)
    resumed = run_processes(2, run, str(tmp_path), 5, {})
    assert [step for step, _, _ in resumed] == [3, 3]
    assert resumed[0][1] == expected


# -------------------------------------------------------------------------------------- damage


def tear(path: Path) -> None:
    """End a data file early."""
    file = max(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a weight of the model."""
    chunk = holdfast.open(path).manifest.tensors["0.weight"].chunks[0]
    data = bytearray((path / chunk.file).read_bytes())
    data[(chunk.item.offset + chunk.item.stop) // 2] ^= 1
    (path / chunk.file).write_bytes(data)


def test_damaged_checkpoints_are_passed_over_and_count_for_nothing(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    """Steps 3 and 4 torn, 2 flipped, and 5 an empty folder: 1 is loaded, and survives two more
    saves with `keep_latest_k = 2`, in which torn folders would push it out."""
    run_processes(2, run, str(tmp_path), 4, {})
    saved = tmp_path / "saved"
    tear(saved / "step-4")
    tear(saved / "step-3")
    flip(saved / "step-2")
    (saved / "step-5").mkdir()
    resumed = run_processes(2, run, str(tmp_path), 2, {"keep_latest_k": 2})
    assert [step for step, _, _ in resumed] == [1, 1]
    first, other = (lines for _, _, lines in resumed)
    assert [line.split(":")[0] for line in first] == [
        f"passed over step {step}" for step in (5, 4, 3, 2)
    ]
    assert "is no checkpoint" in first[0]
    assert "bytes" in first[1]
    assert "has checksum" in first[3]
    assert not other
    # Step 2 was saved anew, so its mark is gone. Steps 3 and 4 are still torn.
    assert steps_in(tmp_path) == [f"step-{step}" for step in range(1, 6)]
    resumed = run_processes(2, run, str(tmp_path), 5, {"keep_latest_k": 2})
    assert [step for step, _, _ in resumed] == [2, 2]
    assert resumed[0][1] == expected
    # The step that the run resumed from stays too.
    assert steps_in(tmp_path) == ["step-2", "step-4", "step-5"]
    assert not holdfast.check(saved / "step-5")


def test_a_flipped_bit_in_a_checkpoint_of_stock(tmp_path: Path, expected: dict[str, Any]) -> None:
    """We pass over it; stock resumes from it, and trains on with other bits."""
    run_processes(2, run, str(tmp_path), 2, {"stock": True})
    flip(tmp_path / "saved/step-2")
    resumed = run_processes(2, run, str(tmp_path), 1, {"load_only": True})
    assert [step for step, _, _ in resumed] == [1, 1]
    assert "has CRC-32" in resumed[0][2][0]
    assert steps_in(tmp_path) == ["step-1", "step-2"]
    resumed = run_processes(2, run, str(tmp_path), 5, {"stock": True})
    assert [step for step, _, _ in resumed] == [2, 2]
    assert resumed[0][1] != expected


def refusals(rank: int, size: int, folder: str) -> list[str]:
    """Errors of loads that name a damaged checkpoint, or find none that is good."""
    warnings.simplefilter("ignore")
    errors = []
    path = f"{folder}/saved/step-2"
    other = {"folder": "other", "initial_load_path": path}
    loads: list[tuple[type[Exception], dict[str, Any]]] = [
        (DamagedError, {"load_step": 2}),
        (DamagedError, other),
        (DamagedError, other | {"initial_load_model_only": False}),
        (FileNotFoundError, {"load_step": 7}),
        (NotFoundError, {}),
    ]
    for kind, keys in loads:
        with pytest.raises(kind) as raised:
            Trainer(folder, **keys)
        errors.append(str(raised.value))
    return errors


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    run_processes(2, run, str(tmp_path), 2, {})
    flip(tmp_path / "saved/step-2")
    tear(tmp_path / "saved/step-1")
    for explicit, model, full, missing, none in run_processes(2, refusals, str(tmp_path)):
        assert "`checkpoint.load_step = -1` takes the newest good checkpoint" in explicit
        assert "has checksum" in model
        assert "has checksum" in full
        assert "step-7" in missing
        assert "no step in" in none
        assert "step 2" in none
        assert "step 1" in none


# ----------------------------------------------------------------------------- other sources


def initial(rank: int, size: int, folder: str) -> None:
    """Starts from `initial_load_path`, of ours and of Hugging Face's format."""
    warnings.simplefilter("ignore")
    first = Trainer(folder, last_save_in_hf=True)
    first.train(2)
    first.manager.save(3, last_step=True)
    weights = whole(first.model[0].weight)
    for keys in (
        {"initial_load_path": f"{folder}/saved/step-2"},
        {"initial_load_path": f"{folder}/saved/step-3", "initial_load_in_hf": True},
    ):
        trainer = Trainer(folder, seed=9, folder="other", **keys)
        assert trainer.loaded
        assert trainer.state.step == 0
        assert whole(trainer.model[0].weight) == weights
        trainer.close()
    # The export is no checkpoint to resume from.
    trainer = Trainer(folder, seed=9)
    assert trainer.state.step == 2
    trainer.close()
    first.close()


def test_initial_loads_and_exports(tmp_path: Path) -> None:
    """An export is a sealed folder, and a resume passes over it."""
    run_processes(2, initial, str(tmp_path))
    export = tmp_path / "saved/step-3"
    assert (export / "holdfast.seal").exists()
    assert not holdfast.check(export)
    assert steps_in(tmp_path) == ["step-1", "step-2", "step-3"]


def model_only(rank: int, size: int, folder: str) -> int:
    """A run that has ended with a model-only save in another dtype, then goes on."""
    warnings.simplefilter("ignore")
    first = Trainer(folder, export_dtype="bfloat16")
    first.train(2)
    first.manager.save(3, last_step=True)
    first.close()
    trainer = Trainer(folder)
    trainer.close()
    return trainer.state.step


def test_a_model_only_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert run_processes(2, model_only, str(tmp_path)) == [2, 2]


def run_in_bucket(
    rank: int, size: int, folder: str, steps: int, keys: dict[str, Any], server: dict[str, str]
) -> tuple[int, dict[str, Any], list[str]]:
    os.environ.update(server)
    return run(rank, size, folder, steps, keys)


def test_a_bucket_is_a_folder_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, Any]
) -> None:
    """Method: two ranks save three steps to a bucket, two in the foreground and one in a thread.
    The bytes of the newest are changed: the run resumes from the one before, with the bits of an
    uninterrupted run. `keep_latest_k = 2` deletes the oldest."""
    server = s3_server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    folder = f"s3://{server.new_bucket()}/run"
    keys = {"folder": folder, "keep_latest_k": 2}
    environment = server.environment
    run_processes(2, run_in_bucket, str(tmp_path), 2, keys, environment)
    in_thread = keys | {"async_mode": "async"}
    resumed = run_processes(2, run_in_bucket, str(tmp_path), 3, in_thread, environment)
    assert [step for step, _, _ in resumed] == [2, 2]
    bucket = CloudBucket(folder)
    data = next(one.key for one in bucket.list_all("step-3") if one.key.endswith("__0_0.distcp"))
    whole = bucket.get(data, 1 << 20)[0]
    bucket.put(data, bytes(255 - byte for byte in whole))
    resumed = run_processes(2, run_in_bucket, str(tmp_path), 5, keys, environment)
    assert [step for step, _, _ in resumed] == [2, 2]
    assert "passed over step 3" in resumed[0][2][0]
    assert resumed[0][1] == expected
    saved = bucket.list("").prefixes
    assert [name for name in saved if "step-" in name] == ["step-2", "step-4", "step-5"]
    assert not list(tmp_path.iterdir())


def remote(rank: int, size: int, folder: str) -> list[str]:
    warnings.simplefilter("ignore")
    lines = Lines()
    for steps in (2, 3):
        trainer = Trainer(folder, folder="memory://saved")
        assert trainer.state.step == (0 if steps == 2 else 2)
        trainer.train(steps)
        trainer.close()
    return lines.lines


def test_other_urls_stay_with_torchtitan(tmp_path: Path) -> None:
    (lines,) = run_processes(1, remote, str(tmp_path))
    assert "TorchTitan saves and loads there itself" in lines[0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ configuration


def configured(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    from torchtitan.components.checkpointer import CheckpointManager as Stock

    from holdfast.hosts.torchtitan import CheckpointManager

    config = CheckpointManager.Config(enable=True, interval=3)
    assert config.to_dict() == Stock.Config(enable=True, interval=3).to_dict()
    assert pickle.loads(pickle.dumps(config)) == config
    assert isinstance(config, Stock.Config)
    disabled = Trainer(folder, enable=False)
    disabled.train(2)
    assert not disabled.loaded
    assert not os.listdir(folder)  # noqa: PTH208
    load_only = Trainer(folder, load_only=True)
    load_only.train(2)
    load_only.close()
    assert not os.listdir(folder)  # noqa: PTH208


def test_the_configuration_is_torchtitans(tmp_path: Path) -> None:
    run_processes(1, configured, str(tmp_path))
