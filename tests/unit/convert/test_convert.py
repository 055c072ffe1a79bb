"""Conversions keep every element, and a target is complete or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.format_utils as stock
from safetensors.torch import load_file

import checkpoints
from extent import every
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.convert.convert import ConvertResult, convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import DamagedError, ExistsError, FormatError, NotFoundError, UsageError
from holdfast.hf.flavors import MODELS, config_of
from holdfast.loading.checkpoint import open_checkpoint
from holdfast.loading.load import load
from holdfast.saving.save import save
from holdfast.storage.local import LocalStore

Nested = dict[str, Any]


def converted(source: Path, target: Path, options: ConvertOptions) -> ConvertResult:
    return convert(plan(str(source), options), str(target))


def assert_good(folder: Path) -> None:
    report = verify(VerifyTarget(LocalStore(folder.parent), folder.name))
    assert report.good, report


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """Compare nested dicts of tensors and values."""
    if isinstance(one, dict):
        assert isinstance(other, dict), where
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("kind", ["holdfast", "stock"])
def test_a_converted_pt_file_equals_that_of_stock_dcp_to_torch(kind: str, tmp_path: Path) -> None:
    """G10: the same nesting, tensors and values, from our checkpoint and a stock one. The file
    loads with `weights_only` and `mmap`, and names that shared a tensor still do."""
    save = checkpoints.save_step if kind == "holdfast" else checkpoints.save_stock
    step = save(tmp_path / "folder")
    converted(step, tmp_path / "ours.pt", ConvertOptions(to="torch"))
    stock.dcp_to_torch_save(step, tmp_path / "stock.pt")
    theirs = torch.load(tmp_path / "stock.pt", weights_only=True)
    for mapped in (False, True):
        ours = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mapped)
        assert_alike(theirs, ours)
    assert ours["model"]["tied"].data_ptr() == ours["model"]["tied_too"].data_ptr() or (
        kind == "stock"
    )
    report = verify(VerifyTarget(LocalStore(tmp_path), "ours.pt"))
    assert report.good


def test_a_checkpoint_converted_from_a_pt_file_loads_as_saved(tmp_path: Path) -> None:
    """Method: a file with a transposed tensor and several types of values, into new state."""
    file = checkpoints.save_torch(tmp_path / "all.pt")
    done = converted(file, tmp_path / "run/step-7", ConvertOptions(to="dcp"))
    assert_good(tmp_path / "run/step-7")
    wanted = torch.load(file, weights_only=True)
    found = {
        key: {
            n: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for n, v in part.items()
        }
        for key, part in wanted.items()
        if isinstance(part, dict)
    }
    state: Nested = {**found, "transposed": torch.zeros(4, 3)}
    load(tmp_path / "run/step-7", state)
    assert_alike(wanted, state)
    manifest = open_checkpoint(tmp_path / "run/step-7").manifest
    assert (manifest.step, manifest.kind) == (7, "full")
    assert done.nbytes == manifest.nbytes


def test_a_model_only_conversion_casts_the_model_and_drops_the_rest(tmp_path: Path) -> None:
    """Method: a checkpoint with an optimizer, converted to a checkpoint and to a file in bfloat16.
    Tensors that are not floating-point keep their dtype."""
    step = checkpoints.save_step(tmp_path / "folder")
    options = {"model_only": True, "dtype": "bfloat16"}
    converted(step, tmp_path / "model.pt", ConvertOptions(to="torch", **options))  # type: ignore[arg-type]
    converted(step, tmp_path / "step-9", ConvertOptions(to="dcp", **options))  # type: ignore[arg-type]
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert found.keys() == {"model"}
    state: Nested = checkpoints.state()
    for name, tensor in state["model"].items():
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert_alike(wanted, found["model"][name])
        assert_alike(wanted, open_checkpoint(tmp_path / "step-9").read(f"model.{name}"))
    manifest = open_checkpoint(tmp_path / "step-9").manifest
    assert (manifest.step, manifest.kind, manifest.values) == (9, "model", {})


def test_a_full_checkpoint_does_not_become_another_step(tmp_path: Path) -> None:
    """G4: a resume would take the state of step 7 for that of step 9. Method: to the folder of
    another step, refused before anything is written; to its own, and to any other name, allowed."""
    step = checkpoints.save_step(tmp_path / "folder")
    with pytest.raises(UsageError) as raised:
        converted(step, tmp_path / "new/step-9", ConvertOptions(to="dcp"))
    assert "step 9" in raised.value.what
    assert "step 7" in raised.value.what
    assert f"`{tmp_path}/new/step-7`" in str(raised.value.hint)
    assert "--model-only" in str(raised.value.hint)
    assert not (tmp_path / "new").exists()
    for target in ("new/step-7", "new/best"):
        converted(step, tmp_path / target, ConvertOptions(to="dcp"))
        assert open_checkpoint(tmp_path / target).manifest.step == checkpoints.STEP
    converted(step, tmp_path / "new/step-0", ConvertOptions(to="dcp", model_only=True))
    assert open_checkpoint(tmp_path / "new/step-0").manifest.step == 0


def test_a_hugging_face_folder_is_split_into_fewer_or_more_files(tmp_path: Path) -> None:
    """Method: three files to one; to many, in another dtype."""
    tensors = hf_tensors(LLAMA)
    source = save_folder(tmp_path / "hf", LLAMA, tensors, num_files=3)
    converted(source, tmp_path / "one", ConvertOptions(to="hf"))
    assert_alike(tensors, load_file(tmp_path / "one/model.safetensors"))
    converted(
        source, tmp_path / "many", ConvertOptions(to="hf", dtype="float16", max_shard_bytes=5000)
    )
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        found |= load_file(file)
    assert_alike({name: tensor.half() for name, tensor in tensors.items()}, found)


def test_a_flavor_replaces_a_missing_config_json(tmp_path: Path) -> None:
    """Method: a checkpoint of a small Llama without `config.json`, exported by name and flavor, and
    converted back."""
    config = config_of("llama3", MODELS["llama3"]["debugmodel"], 300)
    source = save_folder(tmp_path / "hf", config, hf_tensors(config))
    named = {"model_name": "llama3", "model_flavor": "debugmodel"}
    converted(source, tmp_path / "step-0", ConvertOptions(to="dcp", **named))  # type: ignore[arg-type]
    converted(tmp_path / "step-0", tmp_path / "out", ConvertOptions(to="hf", **named))  # type: ignore[arg-type]
    converted(tmp_path / "out", tmp_path / "step-1", ConvertOptions(to="dcp", **named))  # type: ignore[arg-type]
    for name, tensor in hf_tensors(config).items():
        assert_alike(tensor, load_file(tmp_path / "out/model.safetensors")[name])


def test_an_existing_target_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    """G16. Method: each kind of target twice; an empty folder is replaced without `--overwrite`. A
    further file in an export is replaced with it; in a checkpoint's folder it is an error."""
    source = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    for to, name in (("dcp", "step-0"), ("hf", "export"), ("torch", "all.pt")):
        if to != "torch":
            (tmp_path / name).mkdir()
        options = ConvertOptions(to=to)  # type: ignore[arg-type]
        converted(source, tmp_path / name, options)
        with pytest.raises(ExistsError, match="--overwrite"):
            converted(source, tmp_path / name, options)
        again, old = ConvertOptions(to=to, overwrite=True), tmp_path / name / "old.txt"  # type: ignore[arg-type]
        if to != "torch":
            old.write_text("of an earlier export")
        if to == "dcp":
            with pytest.raises(ExistsError, match=r"no part of a checkpoint: `old\.txt`"):
                converted(source, tmp_path / name, again)
            old.unlink()
        converted(source, tmp_path / name, again)
        assert not old.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "step-0", "export", "all.pt"}


def test_verify_finds_flipped_bits_in_a_converted_pt_file(
    tmp_path: Path,
) -> None:
    """G3: every flipped bit that changes what `torch.load` returns is reported. Method: 250 seeded
    bits, then bits around the small records; a fifth of them by default."""
    half = torch.ones(7).half()
    state = {"w": torch.randn(300, 200), "deep": {"half": half}, "n": [1, 2.5, "x"]}
    save(tmp_path / "c", state)
    path = tmp_path / "c.pt"
    converted(tmp_path / "c", path, ConvertOptions(to="torch"))
    whole = path.read_bytes()
    target = VerifyTarget(LocalStore(tmp_path), path.name)
    assert verify(target).good
    assert verify(target).notes == ()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    random = Random(3)
    bits = [random.randrange(len(whole) * 8) for _ in range(250)]
    bits += range(0, 2000 * 8, 11)
    bits += range((len(whole) - 400) * 8, len(whole) * 8, 7)
    bits = every(17, bits)
    changed = 0
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            loaded = torch.load(path, weights_only=True)
            same = str(loaded["n"]) == str(state["n"]) and not checkpoints.differing(
                {"w": loaded["w"], "half": loaded["deep"]["half"]},
                {"w": state["w"], "half": half},
            )
        except Exception:  # noqa: BLE001 - torch refuses it
            continue
        if not same:
            changed += 1
            try:
                assert not verify(target).good, bit
            except FormatError:
                continue
    assert changed > len(bits) / 15


def test_a_source_replaced_during_a_conversion_is_not_called_damaged(tmp_path: Path) -> None:
    """G14. Method: another save replaces the source after planning and before reading."""
    save(tmp_path / "c", {"w": torch.zeros(300)})
    planned = plan(str(tmp_path / "c"), ConvertOptions(to="torch"))
    save(tmp_path / "c", {"w": torch.ones(300), "more": torch.ones(7)}, overwrite=True)
    with pytest.raises(NotFoundError, match="replaced or removed during the conversion"):
        convert(planned, str(tmp_path / "c.pt"))
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


def test_damage_in_the_source_leaves_no_target(tmp_path: Path) -> None:
    """G3, G14. Method: one flipped bit; the error names the tensor, and no target is left."""
    source = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    converted(source, tmp_path / "step-0", ConvertOptions(to="dcp"))
    file = tmp_path / "step-0/__0_0.distcp"
    entry = open_checkpoint(tmp_path / "step-0").tensors["norm.weight"].chunks[0]
    data = bytearray(file.read_bytes())
    assert entry.data_offset is not None
    data[entry.data_offset + 5] ^= 4
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"norm\.weight"):
        converted(tmp_path / "step-0", tmp_path / "out", ConvertOptions(to="torch"))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "step-0"}


@pytest.mark.parametrize("to", ["dcp", "hf", "torch"])
def test_a_killed_conversion_leaves_no_target_and_the_next_one_completes(
    to: str, tmp_path: Path
) -> None:
    """G14. Method: SIGKILL while data is being written; then the same command again, which leaves
    nothing but the target."""
    large = {**LLAMA, "vocab_size": 400_000, "hidden_size": 64}
    source = save_folder(tmp_path / "hf", large, hf_tensors(large))
    target = tmp_path / "below/target"
    command = [
        sys.executable,
        "-m",
        "holdfast.cli",
        "convert",
        str(source),
        str(target),
        "--to",
        to,
    ]
    run = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not [*target.parent.glob(".attempt-*/*")] and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(30) == -signal.SIGKILL
    assert [path.name.split("-")[0] for path in target.parent.iterdir()] == [".attempt"]
    ran = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    assert 0 <= json.loads(ran.stdout)["kept_bytes"] < json.loads(ran.stdout)["nbytes"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert verify(VerifyTarget(LocalStore(target.parent), "target")).good
