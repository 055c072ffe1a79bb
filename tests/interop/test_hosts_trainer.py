"""transformers' Trainer with Holdfast: killed, damaged and resumed, on real files."""

from __future__ import annotations

import json
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.storage.cloud import CloudBucket
from host_buckets import HOSTS, RunBucket
from host_runs import run_commands

# Not by `importorskip`: an import takes seconds in each process of the tests.
if any(find_spec(name) is None for name in ("transformers", "accelerate")):
    pytest.skip("not installed: transformers and accelerate", allow_module_level=True)


def train(**arguments: Any) -> tuple[str, dict[str, Any]]:
    """One run, as a command."""
    return "train_by_trainer", {name: _plain(value) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def same_weights(*files: Path) -> bool:
    first, *others = [torch.load(file, weights_only=True) for file in files]
    return all(
        first.keys() == other.keys() and all(torch.equal(first[n], other[n]) for n in first)
        for other in others
    )


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 6 steps that nothing interrupts: `plain` without Holdfast, `safe` with it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_commands(
        train(out=folder / "plain", plain=True, result=folder / "plain.pt"),
        train(out=folder / "safe", result=folder / "safe.pt"),
    )
    return folder


def test_files_and_weights_are_the_trainers_own(uninterrupted: Path) -> None:
    """The mixin adds the seal, and changes nothing else."""
    assert same_weights(uninterrupted / "plain.pt", uninterrupted / "safe.pt")
    for step in (2, 4, 6):
        plain = {path.name for path in (uninterrupted / f"plain/checkpoint-{step}").iterdir()}
        safe = {path.name for path in (uninterrupted / f"safe/checkpoint-{step}").iterdir()}
        assert safe == plain | {"holdfast.seal"}
        assert holdfast.check(uninterrupted / f"safe/checkpoint-{step}") == []


@pytest.mark.parametrize(
    ("kill", "times"),
    [
        ("model.safetensors", 1),
        ("optimizer.pt", 2),
        ("trainer_state.json", 3),
        ("holdfast.seal", 2),
    ],
)
def test_a_run_killed_in_a_save_resumes_to_the_same_bits(
    tmp_path: Path, uninterrupted: Path, kill: str, times: int
) -> None:
    """SIGKILL while a file of a checkpoint is opened; then the Trainer's own way to resume, which
    starts from the beginning where there is no checkpoint yet."""
    out = tmp_path / "out"
    first = times == 1
    statuses = run_commands(
        train(out=out, kill=kill, times=times),
        train(out=out, resume=None if first else True, result=tmp_path / "end.pt"),
    )
    assert statuses == [-signal.SIGKILL, 0]
    assert same_weights(uninterrupted / "safe.pt", tmp_path / "end.pt")
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def copied(uninterrupted: Path, target: Path) -> Path:
    shutil.copytree(uninterrupted / "safe", target)
    return target


@pytest.mark.parametrize("damage", ["flipped", "torn", "missing"])
def test_damaged_checkpoints_are_passed_over(
    tmp_path: Path, uninterrupted: Path, damage: str
) -> None:
    """G4. Method: the two newest are damaged; the run resumes from the third, to the same bits."""
    out = copied(uninterrupted, tmp_path / "out")
    for step in (4, 6):
        file = out / f"checkpoint-{step}/optimizer.pt"
        if damage == "flipped":
            flip(file)
        elif damage == "torn":
            file.write_bytes(file.read_bytes()[:-1000])
        else:
            file.unlink()
    run_commands(train(out=out, resume=True, result=tmp_path / "end.pt"))
    assert same_weights(uninterrupted / "safe.pt", tmp_path / "end.pt")
    assert [holdfast.check(out / f"checkpoint-{step}") for step in (2, 4, 6)] == [[], [], []]


def test_damage_at_a_given_path_is_an_error(tmp_path: Path, uninterrupted: Path) -> None:
    out = copied(uninterrupted, tmp_path / "out")
    flip(out / "checkpoint-6/model.safetensors")
    with pytest.raises(AssertionError, match=r"DamagedError.*checkpoint-6` is damaged"):
        run_commands(train(out=out, resume=str(out / "checkpoint-6")))


def test_torn_folders_do_not_push_out_good_checkpoints(tmp_path: Path, uninterrupted: Path) -> None:
    """`save_total_limit = 2`: damaged checkpoints do not count, and go when they are old."""
    out = copied(uninterrupted, tmp_path / "out")
    for step in (4, 6):
        (out / f"checkpoint-{step}/optimizer.pt").unlink()
    run_commands(train(out=out, resume=True, steps=4, save_total_limit=2))
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert holdfast.newest_good(out) == out / "checkpoint-4"
    run_commands(train(out=out, resume=True, steps=8, save_total_limit=2))
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]


def test_rotation_fills_up_with_checkpoints_from_before(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """Three checkpoints without a seal, and `save_total_limit = 3`: three are left after a save."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "plain", out)
    run_commands(train(out=out, resume=True, steps=8, save_total_limit=3))
    assert checkpoints(out) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_rotation_keeps_what_was_saved_and_resumed_from(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """A run that goes back to step 2 keeps its own checkpoint, step 2, and the later ones; a copy
    with another name is neither resumed from nor deleted."""
    out = copied(uninterrupted, tmp_path / "out")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2-copy9")
    resume = str(out / "checkpoint-2")
    run_commands(train(out=out, resume=resume, steps=4, save_total_limit=1))
    assert checkpoints(out) == [
        "checkpoint-2",
        "checkpoint-2-copy9",
        "checkpoint-4",
        "checkpoint-6",
    ]
    run_commands(train(out=out, resume=True, steps=8, save_total_limit=1, result=tmp_path / "w.pt"))
    assert (tmp_path / "w.start").read_text() == "6"


def test_the_best_model_is_kept_and_loaded(tmp_path: Path) -> None:
    """Its path in the state is the final one, and `save_total_limit = 1` keeps it."""
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_total_limit": 1,
    }
    run_commands(train(out=out, result=tmp_path / "end.pt", **options))
    newest = holdfast.newest_good(out)
    assert newest is not None
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] in {str(out / name) for name in checkpoints(out)}


def test_a_checkpoint_from_before_is_used_if_none_is_sealed(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """A run without Holdfast goes on with it; the torn newest checkpoint is moved aside."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted / "plain", out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "checkpoint-6").mkdir()
    (out / "checkpoint-6/config.json").write_text("{")
    run_commands(train(out=out, resume=True, result=tmp_path / "end.pt"))
    assert same_weights(uninterrupted / "plain.pt", tmp_path / "end.pt")
    names = checkpoints(out)
    assert [name for name in names if name.startswith("unsealed-checkpoint-6-")]
    assert holdfast.newest_good(out) == out / "checkpoint-6"


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_trainers_of_trl_with_an_adapter(tmp_path: Path, kind: str) -> None:
    """Gradient accumulation, PEFT, a killed save, and the same bits after the resume."""
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    options: dict[str, Any] = {"kind": kind, "gradient_accumulation_steps": 2, "steps": 4}
    statuses = run_commands(
        train(out=tmp_path / "plain", plain=True, result=tmp_path / "plain.pt", **options),
        train(out=tmp_path / "out", kill="optimizer.pt", times=2, **options),
        train(out=tmp_path / "out", resume=True, result=tmp_path / "end.pt", **options),
    )
    assert statuses == [0, -signal.SIGKILL, 0]
    assert same_weights(tmp_path / "plain.pt", tmp_path / "end.pt")
    plain = {path.name for path in (tmp_path / "plain/checkpoint-4").iterdir()}
    safe = {path.name for path in (tmp_path / "out/checkpoint-4").iterdir()}
    assert safe == plain | {"holdfast.seal"}


def test_only_the_model(tmp_path: Path) -> None:
    """`save_only_model` leaves out the optimizer, and the seal covers the rest."""
    run_commands(train(out=tmp_path / "out", steps=2, save_only_model=True))
    names = {path.name for path in (tmp_path / "out/checkpoint-2").iterdir()}
    assert "optimizer.pt" not in names
    assert {"model.safetensors", "trainer_state.json", "holdfast.seal"} <= names


@pytest.mark.parametrize(
    ("sharded", "optimizer"), [(False, "optimizer.pt"), (True, "optimizer_0/__0_0.distcp")]
)
def test_two_processes_killed_damaged_and_resumed(
    tmp_path: Path, sharded: bool, optimizer: str
) -> None:
    """DDP, and FSDP2, which `shard_on_cpu` of host_runs.py makes Accelerate use without an
    accelerator. Rank 1 dies in the middle of its file, and a file is damaged: the run resumes to
    the same bits."""
    options = {"ranks": 2, "sharded": sharded}
    plain, safe = tmp_path / "plain", tmp_path / "safe"
    commands = [
        train(out=plain, plain=True, result=tmp_path / "plain.pt", **options),
        train(out=safe, result=tmp_path / "safe.pt", **options),
    ]
    commands += [
        train(out=tmp_path / "0", limit=4_000, dies=True, rank_killed=1, **options),
        train(out=tmp_path / "0", resume=True, result=tmp_path / "0.pt", **options),
        ("damage", {"file": str(safe / "checkpoint-6" / optimizer), "how": "flipped"}),
        train(out=safe, resume=True, result=tmp_path / "damaged.pt", **options),
    ]
    statuses = run_commands(*commands)
    assert statuses == [0, 0, -signal.SIGXFSZ, 0, 0, 0]
    results = [tmp_path / f"{name}.pt" for name in ("plain", "safe", "0", "damaged")]
    assert same_weights(*results)
    starts = [int(result.with_suffix(".start").read_text()) for result in results]
    assert starts == [0, 0, 2, 4]
    own = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()}
    seals = {f"checkpoint-{step}/holdfast.seal" for step in (2, 4, 6)}
    for root in (safe, tmp_path / "0"):
        found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        assert found == own | seals
        assert all(holdfast.check(root / f"checkpoint-{step}") == [] for step in (2, 4, 6))


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(
    tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match=r"(?i)file too large|os error 27|unexpected pos"):
        run_commands(train(out=out, limit=20_000))
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
    run_commands(train(out=out, resume=True, result=tmp_path / "end.pt"))
    assert same_weights(uninterrupted / "safe.pt", tmp_path / "end.pt")


# ------------------------------------------------------------------------------------ object stores


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_save_to_a_bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: bool, hosts: bool
) -> None:
    """Method: `output_dir` is a URL. Rank 1 dies in its second save. The run is resumed, then the
    newest checkpoint is damaged, and the run is resumed from the one before, to the same bits."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {"environment": bucket.environment, "ranks": 2, "sharded": sharded}
    options["hosts"] = hosts
    plain, out = tmp_path / "plain", bucket.url
    statuses = run_commands(
        train(out=plain, plain=True, result=tmp_path / "plain.pt", **{**options, "hosts": False}),
        train(out=out, limit=4_000, dies=True, rank_killed=1, **options),
        train(out=out, resume=True, result=tmp_path / "killed.pt", **options),
    )
    assert statuses == [0, -signal.SIGXFSZ, 0]
    bucket.damage("checkpoint-6", "__0_0.distcp" if sharded else "optimizer.pt")
    run_commands(train(out=out, resume=True, result=tmp_path / "damaged.pt", **options))
    results = [tmp_path / f"{name}.pt" for name in ("plain", "killed", "damaged")]
    assert same_weights(*results)
    assert [result.with_suffix(".start").read_text() for result in results] == ["0", "2", "4"]
    assert bucket.names() == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    own = {str(p.relative_to(plain / "checkpoint-6")) for p in (plain / "checkpoint-6").rglob("*")}
    own = {path for path in own if (plain / "checkpoint-6" / path).is_file()}
    assert bucket.files("checkpoint-6") == own | {"holdfast.seal"}
    bucket.check_good("checkpoint-2", "checkpoint-4", "checkpoint-6")


def test_settings_work_in_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`save_total_limit`, the best model, a URL to resume from, also that of another run, and
    `save_model(output_dir)`."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {
        "environment": bucket.environment,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 2,
        "learning_rate": 0.1,
    }
    local = tmp_path / "local"
    run_commands(
        train(out=local, result=tmp_path / "local.pt", saves_model=True, **options),
        train(out=bucket.url, kill="optimizer.pt", times=3, **options),
        train(
            out=bucket.url,
            resume=f"{bucket.url}/checkpoint-4",
            result=tmp_path / "bucket.pt",
            saves_model=True,
            **options,
        ),
        train(
            out=f"{bucket.url}-2",
            resume=f"{bucket.url}/checkpoint-4",
            result=tmp_path / "other.pt",
            **options,
        ),
    )
    assert same_weights(tmp_path / "local.pt", tmp_path / "bucket.pt", tmp_path / "other.pt")
    assert (tmp_path / "bucket.start").read_text() == "4"
    assert bucket.names() == [*checkpoints(local), "model"]
    bucket.check_good(*bucket.names())
    fetched = holdfast.newest_good(bucket.url, fetch_to=tmp_path / "copies")
    assert fetched is not None
    state = json.loads((fetched / "trainer_state.json").read_text())
    expected = json.loads((local / fetched.name / "trainer_state.json").read_text())
    best = Path(expected["best_model_checkpoint"]).name
    assert state["best_model_checkpoint"] == f"{bucket.url}/{best}"


def test_objects_in_the_way_are_moved_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Method: another tool has copied files to `checkpoint-2`. They are kept under another name."""
    bucket = RunBucket(monkeypatch, tmp_path)
    CloudBucket(bucket.url).put("checkpoint-2/inner/file", b"mine")
    run_commands(train(out=bucket.url, steps=2, environment=bucket.environment))
    saved, aside = bucket.names()
    assert saved == "checkpoint-2"
    assert aside.startswith("unsealed-checkpoint-2-")
    assert CloudBucket(bucket.url).get(f"{aside}/inner/file", 10)[0] == b"mine"
    bucket.check_good("checkpoint-2")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/run", "to which Holdfast cannot write"),
        ("s3:/bucket/run", "is a URL"),
        ("s3://no-such-bucket/run", "no-such-bucket"),
    ],
)
def test_a_url_that_cannot_be_written_is_refused_before_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, message: str
) -> None:
    bucket = RunBucket(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=message):
        run_commands(train(out=url, result=tmp_path / "end.pt", environment=bucket.environment))
    assert not (tmp_path / "end.start").exists()
