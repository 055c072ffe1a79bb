"""`holdfast.dcp` under `dcp.save`, `dcp.async_save` and `dcp.load` in one process."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from holdfast.cli.main import main
from holdfast.dcp import Reader, Writer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def trained(seed: int = 0) -> dict[str, Any]:
    """State of a small model and its optimizer after one step, with values of several types."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "name": "run",
        "list": [1, 2, {"inside": torch.arange(3.0) + seed}],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0 + seed),
        "half": torch.randn(1000, 7).to(torch.bfloat16),
        "columns": torch.randn(40, 30).t(),
    }


def blank(state: Any) -> Any:
    """The same structure with other contents."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return type(state)()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def loaded(state: Any, reader: Any) -> Any:
    """What `dcp.load` gives for a state of the same structure."""
    target = blank(state)
    dcp_load(target, storage_reader=reader)
    return target


def data_file(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("flatten", [True, False])
def test_both_ways_with_stock(tmp_path: Path, flatten: bool) -> None:
    """Stock DCP reads what `Writer` saved, `Reader` reads what stock DCP saved: all bits equal."""
    state = trained() if flatten else trained()["model"]
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    dcp_save(state, storage_writer=Writer(tmp_path / "ours"), planner=planner)
    dcp_save(state, checkpoint_id=tmp_path / "stock", planner=planner)
    for reader in (
        Reader(tmp_path / "ours"),
        FileSystemReader(tmp_path / "ours"),
        Reader(tmp_path / "stock"),
    ):
        assert same(loaded(state, reader), state)


def test_a_checkpoint_is_holdfasts(tmp_path: Path) -> None:
    """`holdfast.open` reads it and `holdfast verify` finds it good."""
    state = trained()
    dcp_save(state, storage_writer=Writer(tmp_path / "ours"))
    opened = holdfast.open(tmp_path / "ours")
    assert torch.equal(opened.read("model.0.weight"), state["model"]["0.weight"])
    assert opened.value("step") == 7
    assert opened.manifest.layout == {"world_size": 1}
    assert main(["verify", str(tmp_path / "ours")]) == 0


def test_async_save_with_stock_and_default_stagers(tmp_path: Path) -> None:
    state = trained()
    with closing(DefaultStager(StagingOptions(False, False, False, False))) as stager:
        for name, chosen in (("own", None), ("given", stager)):
            saving: Any = async_save(
                state, storage_writer=Writer(tmp_path / name), async_stager=chosen
            )
            getattr(saving, "upload_completion", saving).result()
            assert same(loaded(state, Reader(tmp_path / name)), state)


def test_a_writer_saves_again_by_checkpoint_id(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    dcp_save(trained(1), storage_writer=writer)
    dcp_save(trained(2), storage_writer=writer, checkpoint_id=tmp_path / "b")
    assert same(loaded(trained(), Reader(tmp_path / "a")), trained(1))
    assert same(loaded(trained(), Reader(tmp_path / "b")), trained(2))


def test_planner_caches_work(tmp_path: Path) -> None:
    """A planner with cached plans passes an older plan to `write_data`: the bytes are the new."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for number, name in ((1, "a"), (2, "b"), (3, "b")):
        dcp_save(trained(number), storage_writer=Writer(tmp_path / name), planner=planner)
        assert same(loaded(trained(), Reader(tmp_path / name)), trained(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_overwriting_is_atomic_and_can_be_refused(tmp_path: Path) -> None:
    """A refused or failed save leaves the old checkpoint, and nothing beside it."""
    dcp_save(trained(1), storage_writer=Writer(tmp_path / "a"))
    with pytest.raises(CheckpointException, match="exists already"):
        dcp_save(trained(2), storage_writer=Writer(tmp_path / "a", overwrite=False))

    class Unknown:
        pass

    with pytest.raises(CheckpointException, match=r"`deep\[1\]` is a .*Unknown"):
        dcp_save(trained(2) | {"deep": [1, Unknown()]}, storage_writer=Writer(tmp_path / "a"))
    assert same(loaded(trained(), Reader(tmp_path / "a")), trained(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    dcp_save(trained(2), storage_writer=Writer(tmp_path / "a"))
    assert same(loaded(trained(), Reader(tmp_path / "a")), trained(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    dcp_save(trained(1), storage_writer=Writer(tmp_path / "a", overwrite=False))
    (tmp_path / "a/notes.txt").write_text("mine")
    with pytest.raises(CheckpointException, match=r"notes\.txt"):
        dcp_save(trained(2), storage_writer=Writer(tmp_path / "a"))
    assert (tmp_path / "a/notes.txt").read_text() == "mine"
    assert same(loaded(trained(), FileSystemReader(tmp_path / "a")), trained(1))


def test_damage_is_named(tmp_path: Path) -> None:
    """G3. Method: a flipped bit, a torn file and a missing one; errors name tensor and block, or
    file."""
    state = trained()
    dcp_save(state, storage_writer=Writer(tmp_path / "a"))
    chunk = holdfast.open(tmp_path / "a").tensors["model.0.weight"].chunks[0]
    assert chunk.data_offset is not None
    file = data_file(tmp_path / "a")
    flip(file, chunk.data_offset + 300_000)
    with pytest.raises(CheckpointException, match=r"block 1 of `model\.0\.weight`"):
        loaded(state, Reader(tmp_path / "a"))
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    reader = Reader(tmp_path / "a")
    with pytest.raises(CheckpointException, match="is damaged") as raised:
        loaded(state, reader)
    assert isinstance(raised.value.failures[0][0], holdfast.DamagedError)
    with pytest.raises(holdfast.DamagedError):
        reader.read_metadata()
    file.unlink()
    with pytest.raises(CheckpointException, match=r"__0_0.distcp"):
        loaded(state, reader)
    file.write_bytes(data)
    flip(file, chunk.data_offset + 300_000)
    loaded(state, reader)


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_strangers_code_does_not_run(tmp_path: Path) -> None:
    """Neither the index nor a value of a stock checkpoint is unpickled."""
    dcp_save({"w": torch.ones(3), "v": Bomb(tmp_path / "ran")}, checkpoint_id=tmp_path / "values")
    with pytest.raises(CheckpointException, match="value `v` cannot be read without running code"):
        dcp_load({"w": torch.zeros(3), "v": 0}, storage_reader=Reader(tmp_path / "values"))
    dcp_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "index")
    (tmp_path / "index/.metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointException, match=r"\.metadata"):
        dcp_load({"w": torch.zeros(3)}, storage_reader=Reader(tmp_path / "index"))
    assert not (tmp_path / "ran").exists()


class Temporary(DefaultLoadPlanner):
    """Gives temporary tensors, and copies them where they belong at `commit_tensor`."""

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(super().transform_tensor(read_item, tensor))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().transform_tensor(read_item, self.lookup_tensor(read_item.dest_index)).copy_(tensor)


def test_planners_with_temporary_tensors(tmp_path: Path) -> None:
    state = trained()
    dcp_save(state, storage_writer=Writer(tmp_path / "a"))
    target = blank(state)
    dcp_load(target, storage_reader=Reader(tmp_path / "a"), planner=Temporary())
    assert same(target, state)


class Halving(DefaultSavePlanner):
    """Casts a tensor that was planned in its own dtype."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        given = super().transform_object(write_item, object)
        return given.half() if isinstance(given, torch.Tensor) else given


def test_a_planner_that_breaks_its_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"`w`: the plan says float32 \[3\], the planner"):
        dcp_save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path / "a"), planner=Halving())
    assert not any(tmp_path.iterdir())


def test_tensors_without_plain_elements_are_refused(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointException, match=r"`w` is a torch.Tensor of layout torch.sparse"):
        dcp_save({"w": sparse}, storage_writer=Writer(tmp_path / "a"))
    assert not any(tmp_path.iterdir())


def test_tensors_without_memory_are_refused(tmp_path: Path) -> None:
    """Method: a view of freed memory, saved and loaded into; a meta tensor, saved."""
    buffer = torch.ones(6)
    freed = buffer[3:]
    buffer.untyped_storage().resize_(0)
    cases = {
        "`w` has 3 elements, but its memory was freed": freed,
        "`w` is a meta tensor": torch.ones(3, device="meta"),
    }
    for found, tensor in cases.items():
        with pytest.raises(CheckpointException, match=found):
            dcp_save({"w": tensor}, storage_writer=Writer(tmp_path / "a"))
        assert not any(tmp_path.iterdir())
    dcp_save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path / "a"))
    with pytest.raises(CheckpointException, match="`w` has 3 elements, but its memory was freed"):
        dcp_load({"w": freed}, storage_reader=Reader(tmp_path / "a"))


def test_a_load_into_another_dtype_says_where_it_does_not_fit(tmp_path: Path) -> None:
    dcp_save({"w": torch.tensor([1.5, 1e30])}, storage_writer=Writer(tmp_path / "a"))
    state = {"w": torch.zeros(2, dtype=torch.float64)}
    dcp_load(state, storage_reader=Reader(tmp_path / "a"))
    assert state["w"].tolist() == torch.tensor([1.5, 1e30]).double().tolist()
    with pytest.raises(CheckpointException, match="beyond the range"):
        dcp_load({"w": torch.zeros(2).half()}, storage_reader=Reader(tmp_path / "a"))


SAVE_AND_DIE = """
import os, signal, sys, torch, torch.distributed.checkpoint as dcp
import holdfast.dcp, holdfast.dcp.writer as writer
real = writer.publish
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
writer.publish = die
dcp.save({"w": torch.ones(1000)}, storage_writer=holdfast.dcp.Writer(sys.argv[1]))
"""


def test_a_killed_save_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    """The save is killed before it publishes. Readers see the old checkpoint; the next save, of
    another name, deletes the rest."""
    dcp_save({"w": torch.zeros(1000)}, storage_writer=Writer(tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, tmp_path / "a"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len([*tmp_path.iterdir()]) == 2
    assert loaded({"w": torch.ones(1000)}, Reader(tmp_path / "a"))["w"].sum() == 0
    dcp_save({"w": torch.zeros(1000)}, storage_writer=Writer(tmp_path / "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


class Slow(DefaultSavePlanner):
    """Waits in the middle of a save."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.begun.set()
        self.go.wait(30)
        return super().resolve_data(write_item)


def test_a_second_save_to_a_path_in_use_is_refused(tmp_path: Path) -> None:
    """The first save is not disturbed, not even by what the second leaves to the collector."""
    planner = Slow()
    state = {"w": torch.ones(5)}
    saving: Any = async_save(state, storage_writer=Writer(tmp_path / "a"), planner=planner)
    assert planner.begun.wait(30)
    with pytest.raises(CheckpointException, match=r"another save to .* is in progress"):
        dcp_save({"w": torch.zeros(5)}, storage_writer=Writer(tmp_path / "a"))
    planner.go.set()
    saving.result()
    assert loaded({"w": torch.zeros(5)}, Reader(tmp_path / "a"))["w"].sum() == 5


def test_errors_before_the_first_byte(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointException, match="it is a file"):
        dcp_save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path / "file"))
    with pytest.raises(CheckpointException, match="is a URL"):
        dcp_save({"w": torch.ones(3)}, storage_writer=Writer("https://host/a"))
    with pytest.raises(holdfast.UsageError, match="use_collectives"):
        dcp_save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path / "a"), use_collectives=False)
    with pytest.raises(CheckpointException, match=r"nothing at|does not exist|no checkpoint"):
        dcp_load({"w": torch.ones(3)}, storage_reader=Reader(tmp_path / "none"))
    with pytest.raises(holdfast.UsageError, match="`path`"):
        Writer(7)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def installed() -> Any:
    holdfast.dcp.install()
    holdfast.dcp.install()
    yield
    holdfast.dcp.uninstall()


def has_manifest(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


@pytest.mark.usefixtures("installed")
def test_install_changes_callers_that_name_stock_classes(tmp_path: Path) -> None:
    state = trained()
    dcp_save(state, storage_writer=FileSystemWriter(tmp_path / "a"))
    dcp_save(state, checkpoint_id=tmp_path / "b")
    saving: Any = async_save(state, checkpoint_id=tmp_path / "c")
    saving.result()
    for name in "abc":
        assert has_manifest(tmp_path / name)
        assert same(loaded(state, FileSystemReader(tmp_path / name)), state)
    flip(data_file(tmp_path / "a"), 5000)
    with pytest.raises(CheckpointException, match="checksum"):
        loaded(state, FileSystemReader(tmp_path / "a"))
    sent = pickle.loads(pickle.dumps(FileSystemWriter(tmp_path / "d")))
    assert isinstance(sent, Writer)
    assert sent.checkpoint_id == str(tmp_path / "d")


@pytest.mark.usefixtures("installed")
def test_install_leaves_what_it_cannot_save_to_stock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(FileSystemWriter):
        pass

    state = {"w": torch.ones(3)}
    dcp_save(state, storage_writer=Mine(tmp_path / "a"))
    assert not has_manifest(tmp_path / "a")
    assert isinstance(
        pickle.loads(pickle.dumps(FileSystemReader(tmp_path / "a"))), FileSystemReader
    )
    dcp_save(state, storage_writer=FileSystemWriter(tmp_path / "b"), use_collectives=False)
    assert "without collectives" in caplog.text
    for name in "ab":
        target = {"w": torch.zeros(3)}
        dcp_load(target, storage_reader=FileSystemReader(tmp_path / name))
        assert target["w"].sum() == 3


def test_uninstall_takes_everything_back(tmp_path: Path) -> None:
    before = dict(FileSystemWriter.__dict__), dict(FileSystemReader.__dict__)
    holdfast.dcp.install()
    holdfast.dcp.uninstall()
    assert (dict(FileSystemWriter.__dict__), dict(FileSystemReader.__dict__)) == before
    dcp_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "a")
    assert not has_manifest(tmp_path / "a")


def test_the_current_folder_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a mount point: both are refused before a byte is written, by `holdfast.save` too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "here"):
        with pytest.raises(CheckpointException, match="is the current folder"):
            dcp_save({"w": torch.ones(3)}, storage_writer=Writer(path))
    with pytest.raises(holdfast.UsageError, match="is the current folder"):
        holdfast.save(".", {"w": torch.ones(3)})
    with pytest.raises(holdfast.UsageError, match="is a mount point"):
        holdfast.save("/proc", {"w": torch.ones(3)})
    assert not any((tmp_path / "here").iterdir())


def test_a_relative_path_is_that_of_the_moment_when_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder changes before the save, and before the load."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    writer, reader = Writer("a"), Reader("a")
    monkeypatch.chdir(tmp_path / "two")
    dcp_save({"w": torch.ones(3)}, storage_writer=writer)
    assert (tmp_path / "one/a").is_dir()
    assert loaded({"w": torch.ones(3)}, reader)["w"].sum() == 3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("make", [Writer, FileSystemWriter])
def test_a_relative_path_is_that_of_the_process_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """Method: pickle a writer, as `async_save` sends it to another process, and use it in another
    current folder, with the `checkpoint_id` of its own path or of another."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    sent = pickle.dumps(make("a"))
    monkeypatch.chdir(tmp_path / "two")
    for name in ("a", "b"):
        dcp_save({"w": torch.ones(3)}, storage_writer=pickle.loads(sent), checkpoint_id=name)
        assert has_manifest(tmp_path / "one" / name)
    assert not any((tmp_path / "two").iterdir())
