"""The fast tier of a manager."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from fast_tier import HOSTS, Run, State
from holdfast import CheckpointConfig, CheckpointManager
from holdfast.catalog.tier import read_tier
from holdfast.cli.main import main
from holdfast.comm import Ranks
from holdfast.planning import index
from holdfast.saving.background import Background
from holdfast.saving.write import Pace
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import try_ranks
from holdfast.tier import drain
from holdfast.tier.local import LocalTier


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("async_mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_saves_on_its_hosts_and_copies_some_steps(tmp_path: Path, async_mode: str) -> None:
    """G18. Method: three hosts, ten steps; the copy is bit-equal to what the hosts have together,
    and a restart takes the newest step of the hosts, which the folder of the run has not."""
    run = Run(tmp_path, async_mode=async_mode)
    assert run.train(10) == [0] * 4
    assert run.durable == {"step-4", "step-8"}
    for host in ("node0", "node1", "node2"):
        assert run.local(host) == {"step-8", "step-10"}
    together: dict[str, bytes] = {}
    for host in ("node0", "node1", "node2"):
        together |= files_in(run.disk(host) / "step-8")
    assert together == files_in(tmp_path / "run" / "step-8")
    assert run.resumes_from() == 10
    assert not [path for path in run.disk("node1").iterdir() if "attempt" in path.name]


def test_a_lost_process_costs_nothing_but_the_steps_since_the_last_save(tmp_path: Path) -> None:
    """G18. Method: all processes end after step 11; the hosts and their disks remain."""
    run = Run(tmp_path)
    run.train(11)
    assert run.resumes_from() == 10


@pytest.mark.parametrize(("replicas", "expected"), [(0, 8), (1, 10)])
@pytest.mark.parametrize("lost", ["node0", "node1", "node2"])
def test_a_lost_host(tmp_path: Path, lost: str, replicas: int, expected: int) -> None:
    """G18. Method: a host and its disk are lost, and another with an empty disk takes its place.
    Without a replica, the run resumes from its folder; with one, from the hosts."""
    run = Run(tmp_path, local_replicas=replicas)
    run.train(10)
    shutil.rmtree(tmp_path / "disks" / lost)
    run.hosts = ["new" if host == lost else host for host in HOSTS]
    assert run.resumes_from() == expected
    for disk in (tmp_path / "disks").iterdir():
        assert not [*disk.glob("*/.attempt-*")]
    assert run.train(12) == [expected] * 4


def test_two_lost_hosts_with_replicas_leave_the_durable_folder(tmp_path: Path) -> None:
    """G18. Method: two of three disks are lost, more than replicas cover."""
    run = Run(tmp_path, local_replicas=1)
    run.train(10)
    shutil.rmtree(tmp_path / "disks/node1")
    shutil.rmtree(tmp_path / "disks/node2")
    assert run.resumes_from() == 8


def test_files_travel_to_the_hosts_that_need_them(tmp_path: Path) -> None:
    """G18. Method: the ranks change places among the hosts, and then there are other numbers of
    ranks, all on one of the hosts with disks that have everything."""
    run = Run(tmp_path)
    run.train(10)
    run.hosts = ["node2", "node1", "node0", "node0"]
    assert run.resumes_from() == 10
    run.hosts = ["node1", "node0", "node2", "node0"]
    assert run.resumes_from() == 10


def test_a_checkpoint_with_rows_is_copied_and_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G18. Method: every save writes `index.bin`. The ranks change places, one host loses the file,
    and then a host is lost and another with an empty disk takes its place."""
    monkeypatch.setattr(index, "LISTED_CHUNKS_MAX", 0)
    run = Run(tmp_path, local_replicas=1)
    run.train(10)
    rows = (tmp_path / "run/step-8/index.bin").read_bytes()
    assert rows == (run.disk("node1") / "step-8/index.bin").read_bytes()
    run.hosts = ["node2", "node1", "node0", "node0"]
    assert run.resumes_from() == 10
    (run.disk("node1") / "step-10/index.bin").unlink()
    assert run.resumes_from() == 10
    shutil.rmtree(tmp_path / "disks/node1")
    run.hosts = ["new" if host == "node1" else host for host in HOSTS]
    assert run.resumes_from() == 10


def test_files_of_two_attempts_at_one_step_are_never_mixed(tmp_path: Path) -> None:
    """G18. Method: the disk of one host has step 10 of another attempt."""
    run = Run(tmp_path)
    run.train(10)
    kept = tmp_path / "kept"
    shutil.copytree(run.disk("node1") / "step-10", kept)
    for host in ("node0", "node1", "node2"):
        shutil.rmtree(run.disk(host) / "step-10")
    run.train(10)
    shutil.rmtree(run.disk("node1") / "step-10")
    kept.rename(run.disk("node1") / "step-10")
    assert run.resumes_from() == 8


def test_a_damaged_file_on_a_host_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G4, G18. Method: one byte of a tensor is changed on the disk of a host."""
    run = Run(tmp_path)
    run.train(10)
    file = run.disk("node1") / "step-10" / "__2_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run.resumes_from() == 8
    assert "passed over step 10 of the fast tier" in caplog.text


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_full_local_disk_falls_back_to_the_durable_folder(
    tmp_path: Path,
    async_mode: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G18. Method: the disk of one host has no space for step 6 and later ones."""
    full = f"{tmp_path}/disks/node1/"
    is_full = False
    free_bytes, create = LocalStore.free_bytes, LocalStore.create

    def free(store: LocalStore) -> int | None:
        return 10 if is_full and store.url.startswith(full) else free_bytes(store)

    def create_if_free(store: LocalStore, key: str, nbytes: int) -> Any:
        if is_full and store.url.startswith(full):
            raise holdfast.StorageError("no space left")
        return create(store, key, nbytes)

    # Space runs out before a save, or while it is written in the background.
    if async_mode == "disabled":
        monkeypatch.setattr(LocalStore, "free_bytes", free)
    else:
        monkeypatch.setattr(LocalStore, "create", create_if_free)
    run = Run(tmp_path, async_mode=async_mode)

    def loop(manager: CheckpointManager, state: State, _: int) -> None:
        nonlocal is_full
        for step in range(1, 13):
            is_full = step >= 6
            state.step(step)
            manager.save(step)
            manager.wait()

    run.each(loop)
    assert "the fast tier failed" in caplog.text
    expected = {"step-4", "step-8", "step-12"}
    if async_mode == "async":
        # The save is known to have failed at the next step, which is saved instead.
        expected = {"step-4", "step-9"}
    assert run.durable == expected
    is_full = False
    assert run.resumes_from() == max(int(name[5:]) for name in expected)


def test_each_host_logs_what_it_cannot_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """G7. Method: the disk of a host without rank 0 refuses to delete a step; the run goes on."""
    unpublish = LocalStore.unpublish

    def refuse(store: LocalStore, name: str, removing: str) -> str:
        if "/node1/" in store.url:
            raise holdfast.StorageError(f"no right to rename {name}")
        return unpublish(store, name, removing)

    monkeypatch.setattr(LocalStore, "unpublish", refuse)
    run = Run(tmp_path)
    run.train(10)
    assert run.local("node0") == {"step-8", "step-10"}
    assert run.local("node1") > run.local("node0")
    assert "could not delete step 4: no right to rename step-4; the next save" in caplog.text


def test_hosts_that_share_a_local_folder_are_told(tmp_path: Path) -> None:
    """G16. Method: `local_folder` without `{host}` is one folder for three hosts."""
    run = Run(tmp_path, local_folder=str(tmp_path / "one"))

    def start(ranks: Ranks) -> None:
        model = torch.nn.Linear(3, 3)
        CheckpointManager(tmp_path / "run", model=model, config=run.config, ranks=ranks)

    for error in try_ranks(4, start, hosts=HOSTS):
        assert isinstance(error, holdfast.ExistsError)
        assert "the host replaces `{host}`" in (error.hint or "")


def test_local_steps_do_not_count_for_retention(tmp_path: Path) -> None:
    """G5, G18. Method: two are kept in the folder of the run, whatever the hosts have."""
    run = Run(tmp_path, keep_latest_k=2)
    run.train(20)
    assert run.durable == {"step-16", "step-20"}
    assert run.local() == {"step-18", "step-20"}


def test_the_last_step_and_a_forced_one_are_durable_when_they_return(tmp_path: Path) -> None:
    """G18. Method: a slow copy is in progress then."""
    run = Run(tmp_path, write_bandwidth_limit=0.5)

    def loop(manager: CheckpointManager, state: State, _: int) -> None:
        for step in range(1, 6):
            state.step(step)
            manager.save(step, force=step == 5)
        assert run.durable == {"step-4", "step-5"}
        state.step(7)
        manager.save(7, last_step=True)
        assert run.durable == {"step-4", "step-5", "step-7"}

    run.each(loop)
    assert run.resumes_from() == 7


def test_an_explicit_step_may_be_on_the_hosts_alone(tmp_path: Path) -> None:
    """Method: `load(10)` takes it from the hosts, `load(8)` from the folder of the run."""
    run = Run(tmp_path)
    run.train(10)

    def load(manager: CheckpointManager, state: State, _: int) -> tuple[int, int | None]:
        for step in (8, 10):
            assert manager.load(step) == step
            state.check(step)
        with pytest.raises(holdfast.NotFoundError):
            manager.load(6)
        return manager.steps()[-1], manager.latest_step()

    assert run.each(load) == [(8, 10)] * 4


def test_on_saved_is_called_for_durable_steps(tmp_path: Path) -> None:
    """Method: with the fast tier, once the copy is published."""
    saved: list[int] = []
    Run(tmp_path).train(10, on_saved=lambda step, *_: saved.append(step))
    assert saved == [4, 8]


def test_a_failed_copy_is_raised_by_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7, G18. Method: the folder of the run takes no bytes."""
    create = LocalStore.create

    def fail(store: LocalStore, key: str, nbytes: int) -> Any:
        if store.url.endswith("/run"):
            raise holdfast.StorageError("the disk is gone")
        return create(store, key, nbytes)

    run = Run(tmp_path)
    run.train(2)
    monkeypatch.setattr(LocalStore, "create", fail)
    with pytest.raises(holdfast.StorageError, match="the disk is gone"):
        run.train(20)
    assert run.durable == set()
    monkeypatch.setattr(LocalStore, "create", create)
    assert run.resumes_from() >= 4
    assert not [*(tmp_path / "run").glob(".attempt*")]


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_commands_show_what_only_this_host_has(
    tmp_path: Path, num_hosts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the commands on a run whose newest step is on its hosts alone. A resume takes it;
    they know only if this host has all files."""
    run = Run(tmp_path, [os.uname().nodename, "elsewhere"][:num_hosts])
    run.train(10)
    folder = str(tmp_path / "run")
    assert main(["list", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = [(row["step"], row["state"]) for row in found["checkpoints"]]
    assert states == [(4, "good"), (8, "good"), (10, "local")]
    assert found["resume"] == (10 if num_hosts == 1 else 8)
    for command in ("doctor", "doctor --verify", "verify", "verify --quick"):
        assert main([*command.split(), folder, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["resume"] == found["resume"]
    assert main(["list", folder, "--verify"]) == 0
    assert "local" in capsys.readouterr().out
    assert main(["report", folder, "--out", str(tmp_path / "report.html")]) == 0
    assert 'class="state-local">local<' in (tmp_path / "report.html").read_text()


def test_doctor_finds_local_checkpoints_that_no_restart_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G15. Method: hosts with a newer step than the folder of the run; then the folder has the
    newest one. The commands of the doctor delete what is left on the hosts."""

    def troubles() -> dict[str, dict[str, str]]:
        capsys.readouterr()
        assert main(["doctor", str(tmp_path / "run"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["troubles"]
        return {trouble["where"]: trouble for trouble in found}

    run = Run(tmp_path)
    run.train(10)
    folders = {str(run.disk(host)): host for host in ("node0", "node1", "node2")}
    for folder, trouble in troubles().items():
        assert trouble["what"].startswith(f"step 10 of host {folders[folder]}: a restart finds it")
        assert trouble["mend"] is None
    run.train(12)
    with LocalStore(tmp_path / "run").lock(".lock", "a run that needs them"):
        assert troubles().keys() == {".lock"}
    found = troubles()
    assert found.keys() == folders.keys()
    for folder, trouble in found.items():
        assert trouble["concern"] == "left over"
        assert "none of them newer than step 12" in trouble["what"]
        assert trouble["mend"] == f"rm -r {folder}"
        shutil.rmtree(folder)
    assert troubles() == {}
    (tmp_path / "run/.tier.json").write_text("{}")
    assert troubles()[".tier.json"]["mend"] == f"rm -r {tmp_path}/run/.tier.json"


def test_a_record_of_a_fast_tier_that_is_none_is_replaced(tmp_path: Path) -> None:
    """G8. Method: `.tier.json` holds other things, or names a folder outside; commands go on
    without it, and the next start of the run writes another."""
    run = Run(tmp_path)
    run.train(4)
    record = tmp_path / "run/.tier.json"
    for content in ("", "[1]", '{"id": "../x", "local_folder": "/"}', '{"id": 7}'):
        record.write_text(content)
        with pytest.raises(holdfast.FormatError):
            read_tier(LocalStore(tmp_path / "run"))
        assert main(["list", str(tmp_path / "run")]) == 0
        assert run.resumes_from() == 4
        assert read_tier(LocalStore(tmp_path / "run")) is not None


@pytest.mark.parametrize(
    "settings",
    [{"local_interval": 0}, {"local_replicas": 2}, {"local_folder": " "}, {"local_folder": 3}],
)
def test_settings_of_the_fast_tier_are_checked(settings: dict[str, Any]) -> None:
    """Method: a value of each key that means nothing."""
    with pytest.raises(holdfast.UsageError, match=next(iter(settings))):
        CheckpointConfig(**settings)


def test_a_url_is_no_local_folder(tmp_path: Path) -> None:
    """Method: every rank refuses it, before anything is saved."""
    with pytest.raises(holdfast.UsageError, match="is a URL"):
        Run(tmp_path, local_folder="s3://bucket/run").train(1)


@pytest.mark.parametrize("overlap", ["skip", "queue"])
def test_a_copy_that_is_late_is_skipped_or_made_afterwards(tmp_path: Path, overlap: str) -> None:
    """G18. Method: the copy of step 4 takes until after step 8, when another is due."""
    run = Run(tmp_path, on_save_overlap=overlap)
    reached = threading.Event()

    def wait_for_step_9(step: int, *_: Any) -> None:
        if step == 4:
            reached.wait(30)

    def loop(manager: CheckpointManager, state: State, _: int) -> None:
        for step in range(1, 12):
            state.step(step)
            manager.save(step)
            if step == 9:
                reached.set()
                while "step-4" in run.durable and manager._saver.draining:
                    time.sleep(0.01)

    run.each(loop, on_saved=wait_for_step_9)
    assert run.durable == ({"step-4"} if overlap == "skip" else {"step-4", "step-10"})
    assert "step-10" in run.local()


@pytest.mark.parametrize("async_mode", ["async", "async_with_pinned_mem"])
def test_a_stop_signal_gives_up_the_copy_of_a_save_in_the_background(
    tmp_path: Path, async_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G12, G18. Method: the signal arrives while step 4 is being saved on the host. Its copy to the
    folder of the run would begin after that, and take seconds."""
    run = Run(tmp_path, [os.uname().nodename], async_mode=async_mode)
    is_stopping = threading.Event()
    commit, wait = LocalTier.commit, Background.wait

    def commit_late(tier: LocalTier, *arguments: Any) -> int:
        is_stopping.wait(30)
        return commit(tier, *arguments)

    def note_wait(background: Background) -> None:
        is_stopping.set()
        wait(background)

    monkeypatch.setattr(LocalTier, "commit", commit_late)
    monkeypatch.setattr(drain, "PIECE_BYTES", 1000)
    monkeypatch.setattr(Pace, "wait", lambda *_: time.sleep(0.1))
    state = State(0)
    with (
        pytest.raises(SystemExit) as ended,
        CheckpointManager(
            tmp_path / "run", model=state.model, states={"own": state}, config=run.config
        ) as manager,
    ):
        state.step(4)
        manager.save(4)
        os.kill(os.getpid(), signal.SIGTERM)
        while not manager._steps.stop_signals.received()[0]:
            time.sleep(0.001)
        monkeypatch.setattr(Background, "wait", note_wait)
        state.step(5)
        manager.save(5)
    assert ended.value.code == 128 + signal.SIGTERM
    assert run.durable == {"step-5"}
    assert run.local(os.uname().nodename) == {"step-4"}
