"""Golden checkpoints: written once, and readable for ever.

They were written by the versions in their manifests, and are never written again; a new format gets
new ones. Each has something that the others lack: `solo`; `ranks` (two processes, some tensors
sharded); `timed` (metrics, timings and a model); `blocks` (blocks of 256 KiB; those of earlier ones
have 1 MiB); `components` (names that are not the model's); `structure` (state whose containers and
keys cannot be inferred from its entries); `optimizers` (their classes); `rows` (version 3: three
processes, with the chunks in `index.bin`); `node` (three processes, two of which share a file);
`pages` (large data 64 bytes after the start of a page; that of earlier ones starts on a page);
`stock` (stock `save` of torch 2.13).
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

import holdfast
from golden.golden_state import golden_state, golden_structure, golden_trained
from golden.independent_reader import read, read_manifest, read_state, read_stock
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.errors import DamagedError
from holdfast.format.manifest import decode
from holdfast.state.objects import StateTree
from holdfast.state.same import differences, same
from holdfast.storage.local import LocalStore
from manifest_bytes import encode, encode_with_rows

HERE = Path(__file__).parent
OURS = ["solo", "ranks", "timed", "blocks", "components", "rows", "node", "pages"]
ALL = [*OURS, "stock"]


def bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), flat.numpy().tobytes()
    return type(value), value


def expected() -> dict[str, Any]:
    return {
        name: bits(leaf.value) for name, leaf in StateTree(golden_state()).flatten().leaves.items()
    }


def blank(value: Any) -> Any:
    """Make a state of zeros to load into."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(member) for key, member in value.items()}
    if isinstance(value, list) and any(isinstance(m, (torch.Tensor, dict)) for m in value):
        return [blank(member) for member in value]
    return None


@pytest.mark.parametrize("name", OURS)
def test_the_independent_reader_reads_it_and_checks_every_checksum(
    name: str,
) -> None:
    """G3, G10. Method: a reader written from docs/format.md, through the manifest; it checks every
    checksum, size, container and name."""
    assert {n: bits(value) for n, value in read(HERE / name).items()} == expected()


@pytest.mark.parametrize("name", OURS)
def test_verify_finds_no_damage_in_it(name: str) -> None:
    """G3. Method: a full verify, which compares the bytes around the data too."""
    assert verify(VerifyTarget(LocalStore(HERE), name)).good


@pytest.mark.parametrize("name", ALL)
def test_its_stock_index_has_the_same_entries(name: str) -> None:
    """G10. Method: the same reader, through `.metadata` alone, with pickle and torch's classes."""
    assert {n: bits(value) for n, value in read_stock(HERE / name).items()} == expected()


@pytest.mark.parametrize("name", ALL)
def test_it_is_opened_and_loaded_bit_for_bit(name: str) -> None:
    """G3, G10. Method: `holdfast.open`, entry by entry, and `holdfast.load` as a whole."""
    checkpoint = holdfast.open(HERE / name)
    loaded: dict[str, Any] = {n: checkpoint.read(n) for n in checkpoint.tensors}
    loaded |= {n: checkpoint.value(n) for n in checkpoint.manifest.values}
    assert {n: bits(value) for n, value in loaded.items()} == expected()
    state = blank(golden_state())
    holdfast.load(HERE / name, state)
    assert {
        n: bits(leaf.value) for n, leaf in StateTree(state).flatten().leaves.items()
    } == expected()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", ALL)
def test_stock_loads_it_bit_for_bit(name: str) -> None:
    """G10. Method: stock `load` of the same folder."""
    state = blank(golden_state())
    stock_load(state, checkpoint_id=HERE / name, no_dist=True)
    assert {
        n: bits(leaf.value) for n, leaf in StateTree(state).flatten().leaves.items()
    } == expected()


@pytest.mark.parametrize("name", OURS)
def test_this_version_would_write_the_same_manifest(name: str) -> None:
    """G10. Method: decoded and encoded again, byte for byte. If this fails, the format has changed:
    it needs a new version, not another golden file."""
    data = (HERE / name / "manifest.json").read_bytes()
    if name == "rows":
        manifest = holdfast.open(HERE / name).manifest
        assert encode_with_rows(manifest) == (data, (HERE / name / "index.bin").read_bytes())
    else:
        assert encode(decode(data, where=name)) == data


def test_the_golden_checkpoints_cover_their_special_cases() -> None:
    """Method: two files, sharded tensors, several blocks, tied tensors, an empty one, paths; parts
    of two ranks in one file."""
    everyone = [read_manifest(HERE / name) for name in OURS]
    solo, ranks, timed, blocks, components, rows, node, pages = everyone
    assert [m["checksums"]["block_bytes"] >> 10 for m in everyone] == [1024] * 3 + [256] * 5
    assert [m["holdfast"] for m in everyone] == [2] * 5 + [3, 2, 2]
    starts = [m["tensors"]["large"]["chunks"][0][3] % 4096 for m in (solo, node, pages)]
    assert starts == [0, 0, 64]
    assert [file for file, *_ in node["files"]] == ["__0_0.distcp", "__2_0.distcp"]
    large = node["tensors"]["large"]["chunks"]
    assert [file for file, *_ in large] == [0, 0, 1]
    assert (large[1][1], large[1][4]) == (6 << 16, 8192)
    assert [len(rows["tensors"][f"model.{n}"]["chunks"]) for n in ("rows", "columns")] == [3, 3]
    assert components["components"] == ["large", "list", "values"]
    assert not any("components" in one for one in (solo, ranks, timed, blocks))
    assert [*timed["timings"]] == ["plan", "write", "sync"]
    assert timed["metrics"] == {"loss": 2.5, "norm": None}
    assert timed["model"] == {"model_type": "llama", "rope_scaling": None}
    assert not {"timings", "metrics", "model"} & (solo.keys() | ranks.keys())
    assert len(solo["files"]) == 1
    assert len(ranks["files"]) == 2
    assert len(ranks["tensors"]["model.rows"]["chunks"]) == 2
    assert len(ranks["tensors"]["model.columns"]["chunks"]) == 2
    for manifest in (solo, ranks):
        tensors = manifest["tensors"]
        assert sum(c[2] for c in tensors["large"]["chunks"]) > 1 << 20
        assert tensors["model.tied"]["chunks"] == tensors["model.again"]["chunks"]
        assert tensors["model.empty"]["shape"] == [0, 4]
        assert tensors["list.0"]["path"] == ["list", 0]


@pytest.mark.parametrize("name", OURS)
def test_a_flipped_bit_in_any_of_its_files_is_detected(name: str, tmp_path: Path) -> None:
    """G3. Method: single bits throughout each file of a copy, a prime number of bytes apart; the
    load fails, or no element depends on the byte."""
    import shutil

    copy = tmp_path / name
    shutil.copytree(HERE / name, copy)
    for file in sorted(copy.iterdir()):
        whole = file.read_bytes()
        for position in range(0, len(whole), max(997, len(whole) // 41)):
            broken = bytearray(whole)
            broken[position] ^= 1 << position % 8
            file.write_bytes(broken)
            state = blank(golden_state())
            try:
                holdfast.load(copy, state)
            except DamagedError:
                continue
            assert file.suffix == ".distcp", f"byte {position} of {file.name}"
            assert {
                n: bits(leaf.value) for n, leaf in StateTree(state).flatten().leaves.items()
            } == expected()
        file.write_bytes(whole)


def test_the_independent_reader_does_not_import_holdfast() -> None:
    """Method: the imports in its source."""
    tree = ast.parse((HERE / "independent_reader.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    known = {*sys.stdlib_module_names}
    assert imported - known == {"torch", "xxhash", "numpy"}


class Kept:
    """An object with any state."""

    state: Any = None

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict


def test_structure_is_read_as_it_was_written() -> None:
    """G10, G15. Method: by the independent reader, by `load` into fresh objects, and by `load` into
    an empty state: types of containers, keys and numbers, order, every bit."""
    wanted = golden_structure()
    loaded = read_state(HERE / "structure")
    assert {*loaded} == {*wanted}
    objects: dict[str, Any] = {name: Kept() for name in wanted}
    plain: dict[str, Any] = dict.fromkeys(wanted)
    holdfast.load(HERE / "structure", objects)
    holdfast.load(HERE / "structure", plain)
    for name, value in wanted.items():
        for one in (loaded[name], objects[name].state, plain[name]):
            assert [*differences(value, one, name)] == []
            if isinstance(value, dict):
                assert [*one] == [*value], name


def test_this_version_would_write_the_same_structure() -> None:
    """G10. Method: decoded and encoded again, and flattened again; node by node."""
    data = (HERE / "structure" / "manifest.json").read_bytes()
    manifest = decode(data, where="structure")
    assert encode(manifest) == data
    assert manifest.structure == StateTree(golden_structure()).flatten().structure


def test_the_classes_of_optimizers_are_told_apart_from_the_structure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G10. Method: a model and an AdamW, read by the specification alone; loaded by an optimizer of
    the same class, and by one of another class, with a warning."""
    names = read(HERE / "optimizers")
    assert read_manifest(HERE / "optimizers")["optimizers"] == [
        [["optimizer"], ["torch.optim.adamw.AdamW"]]
    ]
    assert read_state(HERE / "optimizers")["optimizer"]
    wanted = golden_trained()
    assert same(names["optimizer.state.weight.exp_avg"], wanted["model"].weight.detach())
    found = golden_trained()
    with torch.no_grad():
        found["model"].weight.zero_()
    found["optimizer"].state.clear()
    holdfast.load(HERE / "optimizers", found)
    assert same(found["optimizer"].state_dict(), wanted["optimizer"].state_dict())
    assert same(dict(found["model"].state_dict()), dict(wanted["model"].state_dict()))
    assert not caplog.text
    found["optimizer"] = torch.optim.Adam(found["model"].parameters())
    holdfast.load(HERE / "optimizers", found)
    assert "was saved by torch.optim.adamw.AdamW" in caplog.text
