"""Lightning and Fabric with Holdfast: killed, damaged and resumed, on real files, as single files
and as shards of FSDP2 on two CPU processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from host_runs import run_commands

pytest.importorskip("pytorch_lightning")
pytest.importorskip("lightning_fabric")

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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Weights of a run with Holdfast that nothing interrupts, made once for each loop."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def result(loop: str) -> Path:
        file = folder / f"{loop}.pt"
        if not file.exists():
            run_commands(train(loop, out=folder / loop, result=file))
        return file

    return result


@pytest.mark.parametrize("loop", LOOPS)
def test_files_and_weights_are_the_hosts_own(tmp_path: Path, loop: str) -> None:
    """The files of `save_last` and `save_top_k = 2` have the host's bytes."""
    options = {"top_k": 2} if loop == "lightning" else {}
    out = tmp_path / "out"
    run_commands(
        train(loop, out=out, plain=True, result=tmp_path / "plain.pt", **options),
        ("move", {"source": str(out), "target": str(tmp_path / "plain")}),
        train(loop, out=out, result=tmp_path / "safe.pt", **options),
    )
    check_resumed(tmp_path / "plain.pt", tmp_path / "safe.pt", 0)
    kept = [name for name in ALL if loop == "fabric" or name != "step=4.ckpt"]
    assert names(out) == names(tmp_path / "plain") == kept
    for name in kept:
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        assert holdfast.check(out / name) == []


POINTS: list[tuple[dict[str, Any], int]] = [
    ({"kill": ".part-step=8.ckpt", "times": 1}, 4),
    ({"limit": 20_000, "dies": True}, 4),
    ({"kill": ".part-step=8.ckpt", "times": 2}, 4),
    ({"kill": ".part-last.ckpt", "times": 3}, 8),
    ({"kill": ".part-last.ckpt", "times": 4}, 8),
]
"""Where the second save is killed: at the file's opening, at 20 kB, before its rename, and the same
for `last.ckpt`; and the step of the newest good checkpoint."""


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_killed_in_a_save_resumes_from_the_newest_checkpoint(
    tmp_path: Path, uninterrupted: Callable[[str], Path], loop: str
) -> None:
    commands = []
    for number, (point, _) in enumerate(POINTS):
        out = tmp_path / str(number)
        commands += [train(loop, out=out, **point), resumed(loop, out, tmp_path / f"{number}.pt")]
    killed = [-signal.SIGXFSZ if "limit" in point else -signal.SIGKILL for point, _ in POINTS]
    assert run_commands(*commands) == [status for one in killed for status in (one, 0)]
    for number, (_, start) in enumerate(POINTS):
        check_resumed(uninterrupted(loop), tmp_path / f"{number}.pt", start)
        assert names(tmp_path / str(number)) == ALL


def test_damaged_files_are_passed_over(
    tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """Damage of the newest checkpoints: the next older one is loaded, to the same bits."""
    out, loop = tmp_path / "out", "lightning"
    damages = [
        ({"last": "flipped"}, 12),
        ({"last": "torn", "step=12": "flipped"}, 8),
        ({"last": "flipped", "step=12": "torn", "step=8": "flipped"}, 4),
    ]
    commands = [train(loop, out=out)]
    for number, (files, _) in enumerate(damages):
        copy = tmp_path / str(number)
        commands += [("copy", {"source": str(out), "target": str(copy)})]
        commands += [damaged(copy / f"{name}.ckpt", how) for name, how in files.items()]
        # What a killed save leaves is no candidate, whole or not.
        commands += [("copy", {"source": f"{out}/last.ckpt", "target": f"{copy}/.part-a.ckpt"})]
        commands += [resumed(loop, copy, tmp_path / f"{number}.pt")]
    run_commands(*commands)
    for number, (_, start) in enumerate(damages):
        check_resumed(uninterrupted(loop), tmp_path / f"{number}.pt", start)


@pytest.mark.parametrize("loop", LOOPS)
def test_damage_at_a_given_path_is_an_error(tmp_path: Path, loop: str) -> None:
    file = tmp_path / "step=12.ckpt"
    commands = [train(loop, out=tmp_path), damaged(file, "flipped")]
    with pytest.raises(AssertionError, match=r"DamagedError.*step=12.ckpt` is damaged"):
        run_commands(*commands, train(loop, out=tmp_path, resume=file))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_full_disk_is_an_error_and_costs_no_checkpoint(
    tmp_path: Path, uninterrupted: Callable[[str], Path], loop: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AssertionError, match=r"StorageError.*step=8.ckpt.*File too large"):
        run_commands(train(loop, out=out, limit=20_000))
    assert names(out) == ["last.ckpt", "step=4.ckpt"]
    run_commands(resumed(loop, out, tmp_path / "end.pt"))
    check_resumed(uninterrupted(loop), tmp_path / "end.pt", 4)


SHARDED_POINTS: list[tuple[dict[str, Any], int]] = [
    ({"kill": "__1_0.distcp", "times": 3, "rank_killed": 1}, 4),
    ({"kill": "__0_0.distcp", "times": 3}, 4),
    ({"kill": ".metadata.tmp", "times": 9}, 8),
]


@pytest.mark.parametrize("loop", LOOPS)
def test_shards_of_two_processes_killed_damaged_and_resumed(tmp_path: Path, loop: str) -> None:
    """FSDP2 by ModelParallel. The folders have the host's files, and `holdfast.seal`."""
    two: dict[str, Any] = {"sharded": True, "ranks": 2}
    plain, safe = tmp_path / "plain", tmp_path / "safe"
    commands = [
        train(loop, out=plain, plain=True, result=tmp_path / "plain.pt", **two),
        train(loop, out=safe, result=tmp_path / "safe.pt", **two),
    ]
    for number, (point, _) in enumerate(SHARDED_POINTS):
        out = tmp_path / str(number)
        commands += [train(loop, out=out, **point, **two)]
        commands += [resumed(loop, out, tmp_path / f"{number}.pt", **two)]
    commands += [
        damaged(safe / "last.ckpt/__1_0.distcp", "flipped"),
        damaged(safe / "step=12.ckpt/meta.pt", "torn"),
        resumed(loop, safe, tmp_path / "damaged.pt", **two),
    ]
    statuses = run_commands(*commands)
    assert [s for s in statuses if s] == [-signal.SIGKILL] * len(SHARDED_POINTS)
    check_resumed(tmp_path / "plain.pt", tmp_path / "safe.pt", 0)
    check_resumed(tmp_path / "plain.pt", tmp_path / "damaged.pt", 8)
    for number, (_, start) in enumerate(SHARDED_POINTS):
        check_resumed(tmp_path / "plain.pt", tmp_path / f"{number}.pt", start)
        assert names(tmp_path / str(number)) == ALL
    for name in ALL:
        assert names(safe / name) == sorted([*names(plain / name), "holdfast.seal"])
        assert holdfast.check(safe / name) == []
