"""Lightning and Fabric with Holdfast: killed, damaged and resumed, on real files, as single files
and as shards of FSDP2 on two CPU processes."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from host_buckets import HOSTS, RunBucket
from host_runs import run_commands, run_failing

# Not by `importorskip`: an import takes seconds in each process of the tests.
if any(find_spec(name) is None for name in ("pytorch_lightning", "lightning_fabric")):
    pytest.skip("not installed: pytorch_lightning and lightning_fabric", allow_module_level=True)


LOOPS = ["lightning", "fabric"]


def train(loop: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """One run of 3 epochs of 4 steps, as a command. It saves `step=N.ckpt`, then `last.ckpt`."""
    texts = {n: str(v) if isinstance(v, Path) else v for n, v in arguments.items()}
    return f"train_by_{loop}", texts


def resumed(loop: str, out: Path, result: Path, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """Resume as the host's users do: Fabric has no name for the newest checkpoint but its path."""
    path = "last" if loop == "lightning" else str(out / "last.ckpt")
    return train(loop, out=out, resume=path, result=result, **arguments)


def damaged(file: Path, how: str) -> tuple[str, dict[str, Any]]:
    return "damage", {"file": str(file), "how": how}


def check_resumed(expected: Path, result: Path, start: int) -> None:
    """The run began at this step, and ended with the bits of the uninterrupted one."""
    assert int(result.with_suffix(".start").read_text()) == start
    one, other = (torch.load(file, weights_only=True) for file in (expected, result))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ALL = ["last.ckpt", "step=12.ckpt", "step=4.ckpt", "step=8.ckpt"]


POINTS: dict[str, list[tuple[dict[str, Any], int]]] = {
    "lightning": [
        ({"limit": 20_000, "dies": True}, 4),
        ({"kill": ".part-step=8.ckpt-*", "times": 2}, 4),
        ({"kill": ".part-last.ckpt-*", "times": 3}, 8),
    ],
    "fabric": [
        ({"kill": ".part-step=8.ckpt-*", "times": 1}, 4),
        ({"kill": ".part-last.ckpt-*", "times": 4}, 8),
    ],
}
"""Where the second save is killed: in the middle of the file, before its rename, or when it is
opened; and the step of the newest good checkpoint."""

DAMAGES = [
    ({"last": "torn", "step=12": "flipped"}, 8),
    ({"last": "flipped", "step=12": "torn", "step=8": "flipped"}, 4),
]
"""Damaged files, and the step of the newest good checkpoint."""


def commands_of(loop: str, root: Path) -> list[tuple[str, dict[str, Any]]]:
    """All runs of one loop without shards. The last two raise."""
    out, options = root / "out", {"top_k": 2} if loop == "lightning" else {}
    commands = [
        train(loop, out=out, plain=True, result=root / "plain.pt", **options),
        ("move", {"source": str(out), "target": str(root / "plain")}),
        train(loop, out=out, result=root / "safe.pt", **options),
    ]
    for number, (point, _) in enumerate(POINTS[loop]):
        folder = root / f"killed{number}"
        commands += [
            train(loop, out=folder, **point),
            resumed(loop, folder, root / f"killed{number}.pt"),
        ]
    # Lightning is exact after one resume only, so the files are those of a run without any.
    whole = root / "whole"
    commands += [train(loop, out=whole)]
    for number, (files, _) in enumerate(DAMAGES):
        folder = root / f"damaged{number}"
        commands += [
            ("copy", {"source": str(whole), "target": str(folder)}),
            # What a killed save leaves is no candidate, whole or not.
            ("copy", {"source": f"{whole}/last.ckpt", "target": f"{folder}/.part-a.ckpt"}),
            *(damaged(folder / f"{name}.ckpt", how) for name, how in files.items()),
            resumed(loop, folder, root / f"damaged{number}.pt"),
        ]
    commands += [
        ("copy", {"source": str(whole), "target": str(root / "named")}),
        damaged(root / "named/step=12.ckpt", "flipped"),
        train(loop, out=root / "full", limit=20_000),
        train(loop, out=root / "named", resume=root / "named/step=12.ckpt"),
    ]
    return commands


@pytest.fixture(scope="module", params=LOOPS)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[int], str]:
    """The runs of one loop: loop, folder, statuses and errors."""
    root = tmp_path_factory.mktemp(request.param)
    return request.param, root, *run_failing(*commands_of(request.param, root))


Runs = tuple[str, Path, list[int], str]


def test_files_and_weights_are_the_hosts_own(runs: Runs) -> None:
    """The files of `save_last` and `save_top_k = 2` have the host's bytes."""
    loop, root, _, _ = runs
    check_resumed(root / "plain.pt", root / "safe.pt", 0)
    kept = [name for name in ALL if loop == "fabric" or name != "step=4.ckpt"]
    assert names(root / "out") == names(root / "plain") == kept
    for name in kept:
        assert (root / "out" / name).read_bytes() == (root / "plain" / name).read_bytes()
        assert holdfast.check(root / "out" / name) == []


def test_a_run_killed_in_a_save_resumes_from_the_newest_checkpoint(runs: Runs) -> None:
    loop, root, statuses, _ = runs
    assert len([s for s in statuses if s in (-signal.SIGKILL, -signal.SIGXFSZ)]) == len(
        POINTS[loop]
    )
    for number, (_, start) in enumerate(POINTS[loop]):
        check_resumed(root / "plain.pt", root / f"killed{number}.pt", start)
        assert names(root / f"killed{number}") == ALL


def test_damaged_files_are_passed_over(runs: Runs) -> None:
    """The next older one is loaded, to the same bits."""
    _, root, _, _ = runs
    for number, (_, start) in enumerate(DAMAGES):
        check_resumed(root / "plain.pt", root / f"damaged{number}.pt", start)


def test_damage_at_a_given_path_and_a_full_disk_are_errors(runs: Runs) -> None:
    """The full disk leaves the checkpoints before, and nothing else."""
    _, root, statuses, errors = runs
    assert [s for s in statuses if s >= 0][-2:] == [1, 1]
    assert statuses.count(1) == 2
    assert f"DamagedError: `{root}/named/step=12.ckpt` is damaged" in errors
    assert f"StorageError: cannot save `{root}/full/step=8.ckpt`: File too large" in errors
    assert names(root / "full") == ["last.ckpt", "step=4.ckpt"]


@pytest.mark.parametrize("loop", LOOPS)
def test_shards_of_two_processes_killed_damaged_and_resumed(tmp_path: Path, loop: str) -> None:
    """FSDP2 by ModelParallel. The folders have the host's files, and `holdfast.seal`."""
    two: dict[str, Any] = {"sharded": True, "ranks": 2}
    plain, safe = tmp_path / "plain", tmp_path / "safe"
    statuses = run_commands(
        train(loop, out=plain, plain=True, result=tmp_path / "plain.pt", **two),
        train(loop, out=safe, kill="__1_0.distcp", times=3, rank_killed=1, **two),
        resumed(loop, safe, tmp_path / "killed.pt", **two),
        ("copy", {"source": str(safe), "target": str(tmp_path / "copy")}),
        damaged(tmp_path / "copy/last.ckpt/__1_0.distcp", "flipped"),
        damaged(tmp_path / "copy/step=12.ckpt/meta.pt", "torn"),
        damaged(tmp_path / "copy/step=8.ckpt/.metadata", "flipped"),
        resumed(loop, tmp_path / "copy", tmp_path / "damaged.pt", **two),
    )
    assert statuses == [0, -signal.SIGKILL, 0, 0, 0, 0, 0, 0]
    check_resumed(tmp_path / "plain.pt", tmp_path / "killed.pt", 4)
    check_resumed(tmp_path / "plain.pt", tmp_path / "damaged.pt", 4)
    for name in ALL:
        assert names(safe / name) == sorted([*names(plain / name), "holdfast.seal"])
        assert holdfast.check(safe / name) == []


# ------------------------------------------------------------------------------------ object stores


def test_files_in_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fabric, which uses no client of its own. Method: a run is killed while it writes `last.ckpt`,
    and is resumed; then `last.ckpt` and the newest file are damaged."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {"environment": bucket.environment, "out": bucket.url}
    last = f"{bucket.url}/last.ckpt"
    statuses = run_commands(
        train("fabric", **options | {"out": tmp_path / "whole"}, result=tmp_path / "whole.pt"),
        train("fabric", **options, kill="file", times=4),
        train("fabric", **options, resume=last, result=tmp_path / "killed.pt"),
    )
    assert statuses == [0, -signal.SIGKILL, 0]
    assert bucket.names() == ALL
    bucket.damage("", "last.ckpt")
    bucket.damage("", "step=12.ckpt")
    run_commands(train("fabric", **options, resume=last, result=tmp_path / "damaged.pt"))
    check_resumed(tmp_path / "whole.pt", tmp_path / "killed.pt", 8)
    check_resumed(tmp_path / "whole.pt", tmp_path / "damaged.pt", 8)
    bucket.check_good(*ALL)
    bucket.damage("", "step=4.ckpt")
    with pytest.raises(AssertionError, match=r"DamagedError: `.*/step=4.ckpt` is damaged"):
        run_commands(train("fabric", **options, resume=f"{bucket.url}/step=4.ckpt"))


@pytest.mark.parametrize("hosts", HOSTS)
def test_shards_of_two_processes_in_a_bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hosts: bool
) -> None:
    """FSDP2 by ModelParallel. Rank 1 is killed in its file, and checkpoints are damaged."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {"environment": bucket.environment, "sharded": True, "ranks": 2}
    plain, options["hosts"] = {**options, "plain": True}, hosts
    out, last = bucket.url, f"{bucket.url}/last.ckpt"
    statuses = run_commands(
        train("fabric", out=tmp_path / "plain", result=tmp_path / "0.pt", **plain),
        train("fabric", out=out, kill="__1_0.distcp", times=3, rank_killed=1, **options),
        train("fabric", out=out, resume=last, result=tmp_path / "1.pt", **options),
    )
    assert statuses == [0, -signal.SIGKILL, 0]
    bucket.damage("last.ckpt", "__1_0.distcp")
    bucket.damage("step=12.ckpt", "meta.pt")
    run_commands(train("fabric", out=out, resume=last, result=tmp_path / "2.pt", **options))
    check_resumed(tmp_path / "0.pt", tmp_path / "1.pt", 4)
    check_resumed(tmp_path / "0.pt", tmp_path / "2.pt", 8)
    assert bucket.names() == ALL
    for name in ALL:
        assert bucket.files(name) == {*names(tmp_path / "plain" / name), "holdfast.seal"}
    bucket.check_good(*ALL)


@pytest.mark.skipif(find_spec("s3fs") is None, reason="Lightning's Trainer needs s3fs for buckets")
def test_lightnings_trainer_saves_to_a_bucket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ModelCheckpoint(dirpath=URL)`, and `last.ckpt` as `ckpt_path`; old files are deleted.
    Lightning itself does not find `ckpt_path="last"` in a bucket."""
    bucket = RunBucket(monkeypatch, tmp_path)
    options: dict[str, Any] = {"environment": bucket.environment, "top_k": 2}
    last = f"{bucket.url}/last.ckpt"
    statuses = run_commands(
        train("lightning", out=tmp_path / "whole", result=tmp_path / "whole.pt", **options),
        train("lightning", out=bucket.url, kill="file", times=4, **options),
        train("lightning", out=bucket.url, resume=last, result=tmp_path / "end.pt", **options),
    )
    assert statuses == [0, -signal.SIGKILL, 0]
    check_resumed(tmp_path / "whole.pt", tmp_path / "end.pt", 8)
    assert bucket.names() == names(tmp_path / "whole")
    bucket.check_good(*bucket.names())


def test_a_url_that_lost_a_slash_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Method: pathlib makes `s3:/` of `s3://`. It must not become a folder `s3:`."""
    from holdfast.hosts.lightning import HoldfastIO

    monkeypatch.chdir(tmp_path)
    with pytest.raises(holdfast.UsageError, match="is a URL"):
        HoldfastIO().save_checkpoint({}, Path("s3://bucket/last.ckpt"))
    assert not list(tmp_path.iterdir())
