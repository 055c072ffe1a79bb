"""Accelerate with Holdfast: killed, damaged and resumed, on real files, as one process, with DDP,
and with FSDP2, which `shard_on_cpu` of host_runs.py makes Accelerate use without an accelerator."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from host_buckets import HOSTS, RunBucket
from host_runs import run_commands

# Not by `importorskip`: an import takes seconds in each process of the tests.
if find_spec("accelerate") is None:
    pytest.skip("not installed: accelerate", allow_module_level=True)


def train(**arguments: Any) -> tuple[str, dict[str, Any]]:
    """One run with 3 saves, one after every 4 steps, as a command."""
    texts = {n: str(v) if isinstance(v, Path) else v for n, v in arguments.items()}
    return "train_by_accelerate", texts


def damaged(file: Path, how: str) -> tuple[str, dict[str, Any]]:
    return "damage", {"file": str(file), "how": how}


def copied(source: Path, target: Path) -> tuple[str, dict[str, Any]]:
    return "copy", {"source": str(source), "target": str(target)}


def check_resumed(expected: Path, result: Path, start: int) -> None:
    """The run began at this step, and ended with the bits of the uninterrupted one."""
    assert int(result.with_suffix(".start").read_text()) == start
    one, other = (torch.load(file, weights_only=True) for file in (expected, result))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


NAMES = ["checkpoint_0", "checkpoint_1", "checkpoint_2"]

KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"ranks": 2},
    "fsdp2": {"ranks": 2, "sharded": True},
}

OPTIMIZER = {"fsdp2": "optimizer_0/__0_0.distcp"}
"""File of the optimizer, where it is not `optimizer.bin`."""

POINTS: dict[str, list[dict[str, Any]]] = {
    "one": [
        {"kill": "model.safetensors", "times": 2},
        {"kill": "custom_checkpoint_0.pkl", "times": 2},
        {"kill": "holdfast.seal", "times": 2},
        {"limit": 4_000, "dies": True},
    ],
    "ddp": [{"limit": 4_000, "dies": True, "rank_killed": 1}],
    "fsdp2": [
        {"limit": 4_000, "dies": True, "rank_killed": 1},
        {"kill": "holdfast.seal", "times": 2},
    ],
}
"""Where the second save is killed."""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_damaged_and_resumed(tmp_path: Path, kind: str) -> None:
    """`load_state()` takes the newest good checkpoint, and the run ends with the bits of one that
    nothing has interrupted. The files are Accelerate's own, and `holdfast.seal`."""
    options = KINDS[kind]
    plain, safe = tmp_path / "plain", tmp_path / "safe"
    commands = [
        train(out=plain, plain=True, result=tmp_path / "plain.pt", **options),
        train(out=safe, result=tmp_path / "safe.pt", **options),
    ]
    for number, point in enumerate(POINTS[kind]):
        out = tmp_path / str(number)
        commands += [train(out=out, **point, **options)]
        commands += [train(out=out, resume=True, result=tmp_path / f"{number}.pt", **options)]
    copy, optimizer = tmp_path / "copy", OPTIMIZER.get(kind, "optimizer.bin")
    commands += [
        copied(safe, copy),
        damaged(copy / "checkpoints/checkpoint_2" / optimizer, "flipped"),
        damaged(copy / "checkpoints/checkpoint_1" / optimizer, "torn"),
        train(out=copy, resume=True, result=tmp_path / "damaged.pt", **options),
    ]
    statuses = run_commands(*commands)
    assert len([status for status in statuses if status < 0]) == len(POINTS[kind])
    check_resumed(tmp_path / "plain.pt", tmp_path / "safe.pt", 0)
    check_resumed(tmp_path / "plain.pt", tmp_path / "damaged.pt", 4)
    for number in range(len(POINTS[kind])):
        check_resumed(tmp_path / "plain.pt", tmp_path / f"{number}.pt", 4)
    for root in (safe, copy, *(tmp_path / str(number) for number in range(len(POINTS[kind])))):
        assert names(root / "checkpoints") == NAMES
        for name in NAMES:
            own = files(plain / "checkpoints" / name)
            assert files(root / "checkpoints" / name) == own | {"holdfast.seal"}
            assert holdfast.check(root / "checkpoints" / name) == []


def test_explicit_folders(tmp_path: Path) -> None:
    """`prepare(..., folder=)` finds the newest good one. A path may name a checkpoint, or a folder
    of checkpoints. A damaged checkpoint that was named is an error."""
    out: dict[str, Any] = {"named": False, "out": tmp_path / "out"}
    commands = [
        train(**out, result=tmp_path / "whole.pt"),
        damaged(tmp_path / "out/epoch_3/model.safetensors", "flipped"),
        copied(tmp_path / "out", tmp_path / "copy"),
        train(**out, resume=True, result=tmp_path / "folder.pt"),
        ("move", {"source": str(tmp_path / "copy"), "target": str(tmp_path / "out")}),
        train(**out, resume=str(tmp_path / "out"), result=tmp_path / "root.pt"),
        train(**out, resume=str(tmp_path / "out/epoch_1"), result=tmp_path / "named.pt"),
        damaged(tmp_path / "out/epoch_2/optimizer.bin", "torn"),
    ]
    assert run_commands(*commands) == [0] * len(commands)
    check_resumed(tmp_path / "whole.pt", tmp_path / "folder.pt", 8)
    check_resumed(tmp_path / "whole.pt", tmp_path / "root.pt", 8)
    check_resumed(tmp_path / "whole.pt", tmp_path / "named.pt", 4)
    with pytest.raises(AssertionError, match=r"DamagedError.*epoch_2` is damaged"):
        run_commands(train(**out, resume=str(tmp_path / "out/epoch_2")))


def test_a_full_disk_costs_no_checkpoint_of_total_limit(tmp_path: Path) -> None:
    """The failed save leaves the one good checkpoint that `total_limit = 1` keeps."""
    out, folder = tmp_path / "out", tmp_path / "out/checkpoints"
    whole = train(out=tmp_path / "whole", total_limit=2, result=tmp_path / "whole.pt")
    with pytest.raises(AssertionError, match=r"(?i)file too large|os error 27"):
        run_commands(whole, train(out=out, limit=4_000, total_limit=1))
    assert names(tmp_path / "whole/checkpoints") == NAMES[1:]
    assert names(folder) == NAMES[:1]
    run_commands(train(out=out, resume=True, total_limit=1, result=tmp_path / "end.pt"))
    check_resumed(tmp_path / "whole.pt", tmp_path / "end.pt", 4)
    assert names(folder) == NAMES[2:]


# ------------------------------------------------------------------------------------ object stores


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_save_to_a_bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: bool, hosts: bool
) -> None:
    """Method: `project_dir` is a URL. Rank 1 dies in its second save. The run is resumed, then the
    newest checkpoint is damaged, and the run is resumed from the one before, to the same bits."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {"environment": bucket.environment, "ranks": 2, "sharded": sharded}
    options["hosts"] = hosts
    statuses = run_commands(
        train(
            out=tmp_path / "plain",
            plain=True,
            result=tmp_path / "plain.pt",
            **{**options, "hosts": False},
        ),
        train(out=bucket.url, limit=4_000, dies=True, rank_killed=1, **options),
        train(out=bucket.url, resume=True, result=tmp_path / "killed.pt", **options),
    )
    assert [status < 0 for status in statuses] == [False, True, False]
    newest = "checkpoints/checkpoint_2"
    bucket.damage(newest, OPTIMIZER["fsdp2"] if sharded else "optimizer.bin")
    run_commands(
        train(
            out=bucket.url, resume=True, total_limit=2, result=tmp_path / "damaged.pt", **options
        ),
    )
    check_resumed(tmp_path / "plain.pt", tmp_path / "killed.pt", 4)
    check_resumed(tmp_path / "plain.pt", tmp_path / "damaged.pt", 8)
    assert bucket.names("checkpoints") == NAMES[1:]
    assert bucket.files(newest) == files(tmp_path / "plain" / newest) | {"holdfast.seal"}
    bucket.check_good("checkpoints/checkpoint_1", newest)


def test_paths_may_be_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`save_state(URL)`; `load_state` with a checkpoint, with a folder of checkpoints, and without
    a path. A damaged checkpoint that was named is an error."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {
        "environment": bucket.environment,
        "named": False,
        "out": bucket.url,
    }
    commands = [
        train(**options, result=tmp_path / "whole.pt"),
        train(**options, resume=f"{bucket.url}/epoch_1", saves=1, result=tmp_path / "named.pt"),
        train(**options, resume=bucket.url, result=tmp_path / "root.pt"),
    ]
    assert run_commands(*commands) == [0] * len(commands)
    bucket.damage("epoch_3", "model.safetensors")
    run_commands(train(**options, resume=True, result=tmp_path / "folder.pt"))
    for name, start in (("named", 4), ("root", 12), ("folder", 8)):
        assert int((tmp_path / f"{name}.start").read_text()) == start
    check_resumed(tmp_path / "whole.pt", tmp_path / "folder.pt", 8)
    bucket.damage("epoch_2", "optimizer.bin")
    with pytest.raises(AssertionError, match=r"DamagedError.*epoch_2/optimizer.bin"):
        run_commands(train(**options, resume=f"{bucket.url}/epoch_2"))
    bucket.check_good("epoch_1", "epoch_3")
