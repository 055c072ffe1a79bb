"""State that cannot be saved or loaded is reported in full, on every rank; nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from checkpoints import save_leaves
from holdfast.catalog.catalog import Catalog, open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Ranks, Solo
from holdfast.errors import (
    DamagedError,
    ExistsError,
    FormatError,
    HoldfastError,
    MismatchError,
    NotFoundError,
    StorageError,
    UsageError,
)
from holdfast.format import manifest as manifests
from holdfast.format.checksum import BLOCK_BYTES
from holdfast.loading.checkpoint import Checkpoint
from holdfast.loading.load import load_tree
from holdfast.state.objects import StateTree
from holdfast.storage.memory import MemoryStore
from holdfast.storage.store import FileWriter, Store
from holdfast.testing.ranks import try_ranks
from manifest_bytes import encode

State = dict[str, Any]


def small_state() -> State:
    return {
        "model": {"w": torch.randn(20, 3), "b": torch.ones(5, dtype=torch.bfloat16)},
        "step": torch.tensor(7),
        "seen": {"text": "hello", "list": [1, 2.5, None]},
    }


def zeros_like(state: State) -> State:
    return {
        "model": {name: torch.zeros_like(t) for name, t in state["model"].items()},
        "step": torch.tensor(0),
        "seen": {"text": "", "list": []},
    }


def save_in_memory(store: Store, name: str, state: State) -> Source:
    save_leaves(Catalog(store), name, StateTree(state).flatten(), Solo())
    return Source(store, name, open_manifest(store, name))


def read_all(source: Source) -> None:
    checkpoint = Checkpoint(source)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    for name in checkpoint.manifest.values:
        checkpoint.value(name)


# G3: damage


def test_a_flipped_bit_in_any_byte_of_data_is_found_and_named() -> None:
    """G3. Method: one bit in each byte of every tensor and value of a small checkpoint is flipped
    in turn; the error names the tensor and block, and the load fails."""
    store = MemoryStore()
    source = save_in_memory(store, "step-1", small_state())
    data = store._file("step-1/__0_0.distcp")
    places = [
        (f"block 0 of `{name}`", position)
        for name, entry in source.manifest.tensors.items()
        for chunk in entry.chunks
        for position in range(chunk.data_offset or 0, (chunk.data_offset or 0) + entry.nbytes)
    ]
    places += [
        (f"value `{name}`", position)
        for name, value in source.manifest.values.items()
        for position in range(value.item.offset, value.item.stop, 7)
    ]
    for number, (said, position) in enumerate(places):
        data[position] ^= 1 << number % 8
        with pytest.raises(DamagedError, match=said):
            read_all(source)
        data[position] ^= 1 << number % 8
    read_all(source)


LARGE = torch.arange(2 * BLOCK_BYTES + 5000).to(torch.uint8)


@settings(max_examples=40)
@given(st.data())
def test_damage_is_found_only_by_reads_that_touch_its_block(
    data: st.DataObject,
) -> None:
    """G3. Method: one byte of a tensor of three blocks is changed, and any range is read. The error
    names the block; ranges in other blocks are read as saved."""
    store = MemoryStore()
    checkpoint = Checkpoint(save_in_memory(store, "step-1", {"w": LARGE}))
    start = checkpoint.tensors["w"].chunks[0].data_offset
    assert start is not None
    position = data.draw(st.integers(0, len(LARGE) - 1))
    store._file("step-1/__0_0.distcp")[start + position] ^= data.draw(st.integers(1, 255))
    lo, hi = sorted(data.draw(st.tuples(*[st.integers(0, len(LARGE))] * 2)))
    block = position // BLOCK_BYTES
    touched = lo < hi and lo // BLOCK_BYTES <= block <= (hi - 1) // BLOCK_BYTES
    if touched:
        with pytest.raises(DamagedError, match=f"block {block} of `w`"):
            checkpoint.read("w", (slice(lo, hi),))
    else:
        assert torch.equal(checkpoint.read("w", (slice(lo, hi),)), LARGE[lo:hi])


def test_a_file_truncated_after_it_was_opened_is_damaged() -> None:
    """G3. Method: the file is truncated inside its table of checksums, then inside a value, then
    inside a tensor. Only the first of these reads needs the table again."""
    store = MemoryStore()
    source = save_in_memory(store, "step-1", small_state())
    Checkpoint(source).read("model.w")
    data = store._file("step-1/__0_0.distcp")
    del data[-3:]
    with pytest.raises(DamagedError, match="its table of checksums, from byte"):
        Checkpoint(replace(source, tables={})).read("model.w")
    del data[source.manifest.tables["__0_0.distcp"].offset - 3 :]
    with pytest.raises(DamagedError, match="ends inside value"):
        read_all(source)
    offset = source.manifest.tensors["model.w"].chunks[0].data_offset
    assert offset is not None
    del data[offset + 9 :]
    with pytest.raises(DamagedError, match=r"ends inside `model\.w`, at byte"):
        Checkpoint(source).read("model.w")


# G6: matching


def without_chunk(folder: Path, name: str, number: int) -> None:
    """Remove a chunk from a manifest, and update its checksum."""
    file = folder / "manifest.json"
    body = json.loads(file.read_bytes())
    del body["checksum"], body["tensors"][name]["chunks"][number]
    from holdfast.format import checksum

    text = json.dumps(body).encode()
    seal = checksum.to_hex([checksum.checksum(text)]).encode()
    file.write_bytes(text[:-1] + b',"checksum":"' + seal + b'"}')


def test_a_manifest_without_a_chunk_is_damaged_and_changes_no_tensor(tmp_path: Path) -> None:
    """G6. Method: a valid manifest without the chunk of one of three tensors. Stock leaves the
    tensor unchanged and reports nothing."""
    state = small_state()
    holdfast.save(tmp_path / "step-1", state)
    without_chunk(tmp_path / "step-1", "model.b", 0)
    target = zeros_like(state)
    with pytest.raises(DamagedError, match=r"`model\.b`: its chunks hold 0 of the 5 elements"):
        holdfast.load(tmp_path / "step-1", target)
    assert not target["model"]["w"].any()
    assert target["seen"] == {"text": "", "list": []}
    with pytest.raises(DamagedError, match=r"`model\.b`"):
        holdfast.open(tmp_path / "step-1").read("model.b")


def test_every_difference_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    """G6. Method: a missing, an unexpected and a mis-shaped tensor, a tensor for a value and a
    value for a tensor, a dtype that does not convert; one message lists all."""
    state = {
        "fits": torch.ones(2),
        "extra": {"x": torch.ones(1), "y": 1},
        "shape": torch.ones(2, 3),
        "tensor": torch.ones(4),
        "value": 5,
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    holdfast.save(tmp_path / "step-1", state)
    target = {
        "fits": torch.zeros(2),
        "extra": {"missing": torch.zeros(1), "gone": 2},
        "shape": torch.zeros(3, 2),
        "tensor": "text",
        "value": torch.zeros(()),
        "complex": torch.zeros(2),
    }
    with pytest.raises(MismatchError) as refused:
        holdfast.load(tmp_path / "step-1", target)
    said = refused.value.what
    for line in (
        "`extra.missing` is not in the checkpoint",
        "`extra.gone` is not in the checkpoint",
        "`extra.x` is in the checkpoint, but not wanted",
        "`extra.y` is in the checkpoint, but not wanted",
        "`shape` has shape [2, 3] in the checkpoint, expected [3, 2]",
        "`tensor` is a tensor in the checkpoint, expected a str",
        "`value` is a plain value in the checkpoint, expected a tensor",
        "`complex` is complex64 in the checkpoint, expected torch.float32",
    ):
        assert line in said
    assert "8 differences" in said
    fits, missing = target["fits"], target["extra"]
    assert isinstance(fits, torch.Tensor)
    assert isinstance(missing, dict)
    assert not fits.any()
    assert missing["gone"] == 2


def test_further_entries_of_a_checkpoint_are_ignored_without_strict(
    tmp_path: Path,
) -> None:
    """G6. Method: `strict=False`; entries of the state must still be there."""
    holdfast.save(tmp_path / "step-1", {"a": {"x": torch.ones(1), "y": 2}})
    target = {"a": {"x": torch.zeros(1)}}
    holdfast.load(tmp_path / "step-1", target, strict=False)
    assert target["a"]["x"].item() == 1
    with pytest.raises(MismatchError, match=r"`a\.z` is not in the checkpoint"):
        holdfast.load(tmp_path / "step-1", {"a": {"z": torch.zeros(1)}}, strict=False)


def test_an_unknown_name_is_reported_with_similar_names(tmp_path: Path) -> None:
    """Method: a tensor and a value, one letter off; a region outside of the tensor."""
    holdfast.save(tmp_path / "step-1", small_state())
    checkpoint = holdfast.open(tmp_path / "step-1")
    with pytest.raises(NotFoundError, match=r"near it: model\.w"):
        checkpoint.read("model.W")
    with pytest.raises(NotFoundError, match=r"near it: seen\.text"):
        checkpoint.value("seen.test")
    with pytest.raises(UsageError, match="no region"):
        checkpoint.read("model.w", (slice(0, 9, 2),))


# G7: errors of one rank


class FailingStore(MemoryStore):
    """Fails to create the file of one rank."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self._victim = victim

    def create(self, key: str, nbytes: int) -> Any:
        if key.endswith(self._victim):
            raise StorageError(f"cannot write `{key}`: Input/output error")
        return super().create(key, nbytes)


class FailingLate(MemoryStore):
    """Fails with an OSError while the bytes of one file are written."""

    def create(self, key: str, nbytes: int) -> Any:
        made = super().create(key, nbytes)
        return _Failing(made) if key.endswith("__1_0.distcp") else made


class _Failing:
    """A file whose writes fail."""

    def __init__(self, made: Any) -> None:
        self._made = made

    def __enter__(self) -> FileWriter:
        self._made.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self._made.__exit__(*error)

    def write(self, offset: int, parts: Sequence[Any]) -> None:
        raise OSError(5, f"Input/output error in part {len(parts)} at {offset}")


def save_by(size: int, store: Store, state_of: Callable[[int], State]) -> list[Any]:
    """Error of each rank, or None. The ranks share most entries, and each has one of its own."""

    def work(ranks: Ranks) -> None:
        save_leaves(Catalog(store), "step-2", StateTree(state_of(ranks.rank)).flatten(), ranks)

    return try_ranks(size, work)


def replicated(rank: int) -> State:
    return {"a": torch.ones(30), "b": torch.ones(30), "c": torch.ones(30), f"rank_{rank}": rank}


def sparse_on_1(rank: int) -> State:
    return {**replicated(rank), "odd": torch.eye(3).to_sparse() if rank == 1 else torch.eye(3)}


def code_on_2(rank: int) -> State:
    return {**replicated(rank), "mine": {f"rank_{rank}": print if rank == 2 else rank}}


def other_shape_on_2(rank: int) -> State:
    return {**replicated(rank), "a": torch.ones(31 if rank == 2 else 30)}


CASES: list[tuple[str, Callable[[], Store], Callable[[int], State], type[HoldfastError], str]] = [
    ("a tensor that is refused", MemoryStore, sparse_on_1, UsageError, "rank 1: `odd`"),
    ("a value that is refused", MemoryStore, code_on_2, UsageError, r"rank 2: `mine\.rank_2`"),
    ("ranks that disagree", MemoryStore, other_shape_on_2, MismatchError, r"31\] on rank 2"),
    (
        "a store that fails on one rank",
        lambda: FailingStore("__2_0.distcp"),
        replicated,
        StorageError,
        "rank 2: cannot write",
    ),
    ("a write that fails", FailingLate, replicated, StorageError, "rank 1: .*Input/output"),
    (
        "a store that fails at the end",
        lambda: FailingStore("manifest.json"),
        replicated,
        StorageError,
        "manifest.json",
    ),
    ("a full store", lambda: MemoryStore(3000), replicated, StorageError, "needs .* are free"),
]


@pytest.mark.parametrize(
    ("store_of", "state_of", "error", "said"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_an_error_of_one_rank_is_raised_on_all_and_leaves_nothing(
    store_of: Callable[[], Store],
    state_of: Callable[[int], State],
    error: type[HoldfastError],
    said: str,
) -> None:
    """G7, G11. Method: one of three ranks fails in each stage of a save; all ranks get its error,
    of the same class. No attempt is left, and the earlier checkpoint is intact."""
    store = store_of()
    errors = save_by(3, store, state_of)
    for found in errors:
        assert isinstance(found, error), found
        with pytest.raises(error, match=said):
            raise found
    assert list(store.list()) == []


def test_an_error_of_one_loading_rank_is_raised_on_all_and_no_object_changes() -> None:
    """G7. Method: rank 1 wants an entry that is missing; then it alone reads a damaged tensor."""
    store = MemoryStore()
    source = save_in_memory(store, "step-1", {"a": torch.ones(3), "b": torch.ones(3), "n": 5})

    def work(ranks: Ranks) -> Any:
        target: State = {"b" if ranks.rank == 1 else "a": torch.zeros(3), "n": 0}
        if ranks.rank == 1 and not damaged:
            target["absent"] = torch.zeros(1)
        try:
            load_tree(source, StateTree(target), ranks=ranks)
        except HoldfastError as error:
            return error, target["n"]
        return None, target["n"]

    damaged = False
    for error, number in try_ranks(2, work):  # type: ignore[misc]
        assert isinstance(error, MismatchError)
        assert "`absent`" in error.what
        assert number == 0
    damaged = True
    offset = source.manifest.tensors["b"].chunks[0].data_offset
    assert offset is not None
    store._file("step-1/__0_0.distcp")[offset] ^= 1
    for error, number in try_ranks(2, work):  # type: ignore[misc]
        assert isinstance(error, DamagedError)
        assert "rank 1: " in error.what
        assert number == 0


# G8: values that need code


class Custom:
    """A class of the user."""


@pytest.mark.parametrize(
    "value",
    [Custom(), print, lambda: 1, torch.nn.Linear(1, 1).forward, {"deep": [Custom()]}, Path()],
)
def test_a_value_that_only_its_code_can_read_is_not_saved(tmp_path: Path, value: object) -> None:
    """G8. Method: objects and functions, one deep in a list; the error names them, and nothing is
    left."""
    with pytest.raises(UsageError, match=r"`run\.(odd|odd\.deep)"):
        holdfast.save(tmp_path / "step-1", {"w": torch.ones(1), "run": {"odd": value}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_of_a_stock_checkpoint_that_needs_code_is_not_loaded(
    tmp_path: Path,
) -> None:
    """G8. Method: stock saves the object, and runs its pickle on load. Holdfast loads the rest, and
    refuses the value with its name and class."""
    from torch.distributed.checkpoint.state_dict_saver import save as stock_save

    stock_save(
        {"w": torch.ones(2), "odd": Custom()}, checkpoint_id=tmp_path / "step-1", no_dist=True
    )
    target = {"w": torch.zeros(2)}
    holdfast.load(tmp_path / "step-1", target)
    assert target["w"].tolist() == [1, 1]
    with pytest.raises(FormatError, match=r"`odd`.*Custom"):
        holdfast.load(tmp_path / "step-1", {"w": torch.zeros(2), "odd": None})


# Places


def test_a_save_replaces_only_a_checkpoint_and_only_with_overwrite(tmp_path: Path) -> None:
    """G1. Method: onto a checkpoint, a folder and a file; with `overwrite` the checkpoint is
    replaced, and nothing is left of the old one."""
    path = tmp_path / "step-1"
    holdfast.save(path, {"n": 1})
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    for taken in (path, tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(ExistsError, match="exists already"):
            holdfast.save(taken, {"n": 2})
    assert holdfast.open(path).value("n") == 1
    holdfast.save(path, {"n": 2}, overwrite=True)
    assert holdfast.open(path).value("n") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "step-1"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_an_interrupted_attempt_is_cleaned_up_by_the_next_save_of_its_name_only(
    tmp_path: Path,
) -> None:
    """G1. Method: attempts of two names are left, and a folder of the user is beside them."""
    for name in (".attempt-step-1-00000001", ".attempt-step-2-00000002", "notes"):
        (tmp_path / name).mkdir()
    holdfast.save(tmp_path / "step-1", {"n": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".attempt-step-2-00000002", "notes", "step-1"
    ]  # fmt: skip


def test_a_checkpoint_may_be_moved_and_copied(tmp_path: Path) -> None:
    """G1. Method: a copy in another folder under another name opens."""
    holdfast.save(tmp_path / "step-1", {"n": 1, "w": torch.ones(3)})
    shutil.copytree(tmp_path / "step-1", tmp_path / "else" / "best")
    assert holdfast.open(tmp_path / "else" / "best").read("w").tolist() == [1, 1, 1]


def test_a_manifest_equals_itself_after_encoding_and_decoding() -> None:
    """Method: the manifest of a save."""
    source = save_in_memory(MemoryStore(), "step-1", small_state())
    data = encode(source.manifest)
    assert manifests.decode(data, where="m") == source.manifest


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"model": {"w": torch.zeros(1)}, "optimizer": {"step": torch.zeros(1)}}, "full"),
        ({"model": {"w": torch.zeros(1)}, "step": 3}, "model"),
        ({"optimizer.w": torch.zeros(1)}, "model"),
    ],
)
def test_a_save_without_a_kind_derives_it_from_the_names(
    state: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """Method: states with and without optimizer entries."""
    holdfast.save(tmp_path / "step", state)
    assert json.loads((tmp_path / "step" / "manifest.json").read_bytes())["kind"] == kind
