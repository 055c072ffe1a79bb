"""Folders and files of other programs: read, or named with the way on."""

from __future__ import annotations

import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from hf_folders import LLAMA, hf_tensors, low_rank, save_adapter, save_folder
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.cli.main import main
from holdfast.convert.convert import convert
from holdfast.convert.export_check import ExportReport, check_export
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import (
    DamagedError,
    FormatError,
    HoldfastError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from holdfast.storage.local import LocalStore


def converted(source: Path, target: Path, **options: Any) -> str:
    """Convert to a checkpoint; return the notes."""
    planned = plan(str(source), ConvertOptions(to="dcp", **options))
    convert(planned, str(target))
    return "\n".join(planned.notes)


def assert_holds(step: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has these tensors and no others."""
    checkpoint = holdfast.open(step)
    assert {*checkpoint.tensors} == {*tensors}
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor), name


def verified(path: Path) -> Any:
    return verify(VerifyTarget(LocalStore(path.parent), path.name))


def refusal(source: Path) -> HoldfastError:
    """Return the error of a conversion, and check that `verify` says the same."""
    with pytest.raises(HoldfastError) as refused:
        plan(str(source), ConvertOptions(to="dcp"))
    with pytest.raises(type(refused.value)) as refused_too:
        verified(source)
    assert refused.value.what == refused_too.value.what
    return refused.value


WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.arange(3.0)}


def save_bins(folder: Path, tensors: Mapping[str, Tensor], num_files: int) -> Path:
    """Write a folder with `.bin` weights, as transformers did before safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"lr": 1}, folder / "training_args.bin")
    if num_files == 1:
        torch.save({**tensors}, folder / "pytorch_model.bin")
        return folder
    index: dict[str, str] = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        part = {name: tensors[name] for name in [*tensors][number::num_files]}
        index |= dict.fromkeys(part, file)
        torch.save(part, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_folder_of_bin_files_converts_like_one_of_safetensors(
    num_files: int, tmp_path: Path
) -> None:
    """G10. Method: the same model in both formats, to a checkpoint and to Hugging Face; `verify` of
    a damaged and of a missing file."""
    tensors = hf_tensors(LLAMA)
    bins = save_bins(tmp_path / "bins", tensors, num_files)
    safe = save_folder(tmp_path / "safe", LLAMA, tensors)
    for number, source in enumerate((bins, safe)):
        converted(source, tmp_path / f"step-{number}", model_only=True)
    one, other = (holdfast.open(tmp_path / f"step-{number}") for number in (0, 1))
    assert one.tensors
    assert_holds(tmp_path / "step-1", {name: one.read(name) for name in one.tensors})
    assert {*one.tensors} == {*other.tensors}
    report = verified(bins)
    assert (report.format, report.good) == ("bin", True)
    file = next(bins.glob("pytorch_model*.bin"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert [finding.file for finding in verified(bins).findings] == [file.name]
    if num_files > 1:
        file.unlink()
        assert "is missing" in verified(bins).findings[0].what
        with pytest.raises(DamagedError, match=r"are missing"):
            plan(str(bins), ConvertOptions(to="dcp"))


def test_an_index_that_does_not_name_the_single_file_is_stale(tmp_path: Path) -> None:
    """Method: a model that was saved again as a single file beside its old shards and their index.
    transformers takes the single file."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA), num_files=2)
    newer = {name: tensor + 1 for name, tensor in hf_tensors(LLAMA).items()}
    save_file(newer, folder / "model.safetensors")
    opened = plan(str(folder), ConvertOptions(to="dcp")).opened
    assert {*opened.checkpoint.manifest.files} == {"model.safetensors"}
    assert any("as by transformers" in note for note in opened.notes)
    assert any("as by transformers" in note for note in verified(folder).notes)


def test_modules_of_a_sentence_encoder_are_found(tmp_path: Path) -> None:
    """Method: a folder as sentence-transformers saves it, with the transformer in the folder
    itself, and with every module in a folder of its own; a path out of the folder."""
    tensors = hf_tensors(LLAMA)
    model = save_folder(tmp_path / "model", LLAMA, tensors)
    (model / "2_Dense").mkdir()
    save_file(WEIGHTS, model / "2_Dense/model.safetensors")
    modules: list[dict[str, object]] = [
        {"idx": 0, "path": ""},
        {"idx": 1, "path": "1_Pooling"},
        {"path": "2_Dense"},
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    opened = plan(str(model), ConvertOptions(to="dcp")).opened
    assert any(f"holdfast show {model}/2_Dense" in note for note in opened.notes)
    shutil.copytree(model / "2_Dense", tmp_path / "nested/0_Net")
    modules[0]["path"] = "0_Net"
    (tmp_path / "nested/modules.json").write_text(json.dumps(modules))
    converted(tmp_path / "nested", tmp_path / "step-1")
    assert_holds(tmp_path / "step-1", WEIGHTS)
    modules[0]["path"] = "../model"
    (tmp_path / "nested/modules.json").write_text(json.dumps(modules))
    with pytest.raises(HoldfastError):
        plan(str(tmp_path / "nested"), ConvertOptions(to="dcp"))


@pytest.mark.parametrize("above", ["", "checkpoints", "lightning_logs/version_3/checkpoints"])
def test_a_lightning_file_gives_its_tensors(above: str, tmp_path: Path) -> None:
    """Method: a file as Lightning writes it, with arguments that are a Namespace, found from the
    folder above. With a second file the message names both; the hint names the newer."""
    folder = tmp_path / "run" / above
    folder.mkdir(parents=True)
    state = {"state_dict": WEIGHTS, "epoch": 3, "hyper_parameters": Namespace(lr=0.1)}
    torch.save(state, folder / "epoch=3-step=40.ckpt")
    notes = converted(tmp_path / "run", tmp_path / "step-1")
    assert "left out `hyper_parameters`: argparse.Namespace" in notes
    assert f"{folder}/epoch=3-step=40.ckpt" in notes
    assert_holds(tmp_path / "step-1", {f"state_dict.{n}": t for n, t in WEIGHTS.items()})
    assert holdfast.open(tmp_path / "step-1").value("epoch") == 3
    torch.save(state, folder / "last.ckpt")
    error = refusal(tmp_path / "run")
    assert "`epoch=3-step=40.ckpt`, `last.ckpt`" in error.what
    assert str(error.hint).endswith("last.ckpt")


def test_a_checkpoint_of_accelerate_with_fsdp_is_found(tmp_path: Path) -> None:
    """Method: a sharded state dict in a folder of Accelerate; one of whole weights beside it, and
    one of local states, which nothing describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save({"model": WEIGHTS}, checkpoint_id=tmp_path / "run/pytorch_model_fsdp_0")
        stock_save({"optimizer": {"x": torch.ones(2)}}, checkpoint_id=tmp_path / "run/optimizer_0")
    (tmp_path / "run/random_states_0.pkl").write_bytes(b"")
    converted(tmp_path / "run", tmp_path / "step-1")
    assert_holds(tmp_path / "step-1", {f"model.{n}": t for n, t in WEIGHTS.items()})
    (tmp_path / "local").mkdir()
    torch.save(WEIGHTS, tmp_path / "local/pytorch_model_fsdp_0_rank0.bin")
    error = refusal(tmp_path / "local")
    assert "LOCAL_STATE_DICT" in error.what
    assert "SHARDED_STATE_DICT" in str(error.hint)


def test_a_checkpoint_of_megatron_is_found(tmp_path: Path) -> None:
    """Method: `torch_dist` beside its `common.pt`; the older format of one rank, and of two, which
    nothing describes; a pointer to a checkpoint that is not there."""
    run = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_save(dict(WEIGHTS), checkpoint_id=run / "iter_0000005")
    torch.save({"args": Namespace(x=1)}, run / "iter_0000005/common.pt")
    (run / "latest_checkpointed_iteration.txt").write_text("5")
    converted(run, tmp_path / "step-5")
    assert_holds(tmp_path / "step-5", WEIGHTS)
    (run / "latest_checkpointed_iteration.txt").write_text("6")
    assert "names `iter_0000006`, which is not in it" in refusal(run).what
    older = tmp_path / "older/iter_0000005"
    (older / "mp_rank_00").mkdir(parents=True)
    torch.save({"model": WEIGHTS}, older / "mp_rank_00/model_optim_rng.pt")
    converted(older, tmp_path / "step-6")
    assert_holds(tmp_path / "step-6", {f"model.{n}": t for n, t in WEIGHTS.items()})
    shutil.copytree(older / "mp_rank_00", older / "mp_rank_01")
    error = refusal(older)
    assert "divided over 2 ranks" in error.what
    assert "torch_dist" in str(error.hint)


def test_folders_of_trainers_and_pipelines_are_named(tmp_path: Path) -> None:
    """Method: two checkpoints of a trainer; a pipeline of diffusers with two models; each is one
    message with a command for one of its checkpoints. A single one is opened."""
    for step in (9, 10):
        save_folder(tmp_path / f"run/checkpoint-{step}", LLAMA, hf_tensors(LLAMA))
    error = refusal(tmp_path / "run")
    assert "`checkpoint-9`, `checkpoint-10`" in error.what
    assert error.hint == f"holdfast show {tmp_path}/run/checkpoint-10"
    shutil.rmtree(tmp_path / "run/checkpoint-10")
    assert verified(tmp_path / "run").good
    for name in ("unet", "vae"):
        (tmp_path / "pipeline" / name).mkdir(parents=True)
        file = tmp_path / "pipeline" / name / "diffusion_pytorch_model.safetensors"
        save_file(WEIGHTS, file)
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    assert (
        "a pipeline of diffusers, which holds 2: `unet`, `vae`"
        in refusal(tmp_path / "pipeline").what
    )


def test_a_model_of_diffusers_keeps_the_names_of_its_files(tmp_path: Path) -> None:
    """Method: a part of a pipeline becomes a checkpoint, then a folder of one file and one of
    several, with the names that diffusers looks for and no key that it does not know. Both are read
    again, and good by the check of exports."""
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
    stem, part = "diffusion_pytorch_model", tmp_path / "pipeline" / "unet"
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config))
    weights = {"conv_in.weight": torch.rand(4, 3, 3, 3), "conv_out.weight": torch.rand(3, 4, 3, 3)}
    save_file(weights, part / f"{stem}.safetensors")
    planned = plan(str(part), ConvertOptions("dcp"))
    assert any("'UNet2DConditionModel'" in note for note in planned.notes)
    convert(planned, str(tmp_path / "step-0"))
    for size, num_shards in ((10**9, 1), (500, 2)):
        folder = tmp_path / f"exported-{num_shards}"
        options = ConvertOptions("hf", hf_assets=str(part), max_shard_bytes=size)
        convert(plan(str(tmp_path / "step-0"), options), str(folder))
        assert json.loads((folder / "config.json").read_text()) == config
        index = folder / f"{stem}.safetensors.index.json"
        assert index.exists() == (num_shards > 1)
        assert len([*folder.glob(f"{stem}*.safetensors")]) == num_shards
        converted(folder, tmp_path / f"again-{num_shards}")
        assert_holds(tmp_path / f"again-{num_shards}", weights)
        assert check_export(str(folder)) == ExportReport((), ())


def test_rules_rename_the_tensors_of_the_model(tmp_path: Path) -> None:
    """Method: names that torch.compile, DDP and PEFT change; the note has the rules, and with them
    the model converts to its family's names. Rules that match nothing or collide are refused."""
    tensors = hf_tensors(LLAMA)
    expected = plan(str(save_folder(tmp_path / "hf", LLAMA, tensors)), ConvertOptions(to="dcp"))
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod."):
        file = tmp_path / f"{prefix}pt"
        torch.save({"model": {prefix + n: t for n, t in tensors.items()}, "epoch": 1}, file)
        rule = f"{prefix[:-1]}="
        assert any(f"--rename '{rule}'" in n for n in plan(str(file), ConvertOptions("dcp")).notes)
        planned = plan(str(file), ConvertOptions("dcp", renames=(rule,)))
        assert {*planned.opened.model.infos} == {*tensors}
        options = ConvertOptions("hf", renames=(rule,), hf_assets=str(tmp_path / "hf"))
        assert {*plan(str(file), options).outputs} == {*tensors}
    assert expected.outputs
    renames = ("module.model.=body.", "module=")
    converted(tmp_path / "module.pt", tmp_path / "step-1", renames=renames)
    names = {*holdfast.open(tmp_path / "step-1").tensors}
    assert names == {f"model.{n.replace('model.', 'body.', 1)}" for n in tensors}
    for rules, words in ((("x=y",), "no tensor matches"), (("{}=a",), "`theirs=ours`")):
        with pytest.raises(UsageError, match=words) as refused:
            plan(str(tmp_path / "module.pt"), ConvertOptions("dcp", renames=rules))
        assert "--rename" in refused.value.what
    with pytest.raises(UsageError) as refused:
        plan(str(tmp_path / "module.pt"), ConvertOptions("dcp", renames=("model=",)))
    assert "below the key `model`, which stays; names there: module." in str(refused.value.hint)


def test_rules_are_suggested_in_the_order_of_the_tensors(tmp_path: Path) -> None:
    """Method: several wrapped parts, whose rules the note lists in the same order each time."""
    parts = ("stem", "body", "neck", "head", "pool", "gate")
    file = tmp_path / "wrapped.pt"
    torch.save({f"{part}._orig_mod.weight": torch.ones(1) for part in parts}, file)
    (note,) = plan(str(file), ConvertOptions("dcp")).notes
    rules = " ".join(f"--rename '{part}._orig_mod={part}'" for part in parts)
    assert f"`{rules}` drops them" in note


def test_names_without_the_prefix_of_the_family_are_recognised(tmp_path: Path) -> None:
    """Method: a model saved without its head's wrapper, as embedding models are: the error's hint
    has the rules that make it fit, and with these rules it converts."""
    tensors = hf_tensors({**LLAMA, "tie_word_embeddings": True})
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    folder = save_folder(tmp_path / "hf", {**LLAMA, "tie_word_embeddings": True}, bare)
    with pytest.raises(MismatchError) as refused:
        plan(str(folder), ConvertOptions(to="dcp"))
    hint = str(refused.value.hint)
    rules = tuple(hint.split("'")[1::2])
    assert rules
    assert plan(str(folder), ConvertOptions(to="dcp", renames=rules)).outputs


def test_a_prefix_of_any_name_is_recognised(tmp_path: Path) -> None:
    """Method: a model inside a module of its owner's, with a tensor of that module beside it: the
    hint drops the prefix. No tensor of the model is called tied, as none is."""
    tensors = {f"net.policy.{name}": tensor for name, tensor in hf_tensors(LLAMA).items()}
    tensors["net.value.weight"] = torch.ones(2)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    with pytest.raises(MismatchError) as refused:
        plan(str(folder), ConvertOptions("dcp"))
    assert "`--rename 'net.policy='` gives the expected names" in str(refused.value.hint)
    assert "ties" not in refused.value.what
    options = ConvertOptions("dcp", renames=("net.policy=",), skip=("net.value.*",))
    assert plan(str(folder), options).outputs


def test_integers_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    """Method: int8 without its scales, from a folder and from a `.pt` file of native names."""
    tensors = hf_tensors(LLAMA)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    convert(plan(str(folder), ConvertOptions("torch")), str(tmp_path / "native.pt"))
    native = torch.load(tmp_path / "native.pt")
    for one in (tensors, native):
        name = next(name for name in one if "layers.0." in name)
        one[name] = one[name].to(torch.int8)
    whole = save_folder(tmp_path / "int8", LLAMA, tensors)
    torch.save(native, tmp_path / "int8.pt")
    for path in (whole, tmp_path / "int8.pt"):
        with pytest.raises(MismatchError, match="is int8, expected floats of 16 bits"):
            plan(str(path), ConvertOptions("hf", hf_assets=str(folder)))


def test_fp8_of_a_state_is_kept_and_of_an_export_said(tmp_path: Path) -> None:
    """Method: fp8 without factors, which is refused in published weights only, in a state dict
    that goes to a checkpoint and back, and to an export without a table."""
    weight = torch.ones(2, 2).to(torch.float8_e5m2)
    torch.save({"w": weight, "b": torch.ones(2)}, tmp_path / "model.pt")
    assert converted(tmp_path / "model.pt", tmp_path / "step-0") == ""
    convert(plan(str(tmp_path / "step-0"), ConvertOptions("torch")), str(tmp_path / "back.pt"))
    found = torch.load(tmp_path / "back.pt")["w"]
    assert found.dtype == weight.dtype
    assert torch.equal(found.float(), weight.float())
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "config.json").write_text('{"model_type": "mine", "architectures": ["Mine"]}')
    notes = plan(str(tmp_path / "step-0"), ConvertOptions("hf", hf_assets=str(assets))).notes
    assert "1 tensors such as `w` are float8_e5m2" in notes[1]


def test_files_that_are_cut_short_or_unusual_are_called_so(tmp_path: Path) -> None:
    """Method: a truncated archive, two entries of one name, a key that is no text. None is called
    another program's."""
    file = tmp_path / "x.pt"
    for contents, words in (
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two entries are named `a.b`"),
        ({(1, 2): torch.ones(1)}, "a key that is a tuple"),
    ):
        torch.save(contents, file)
        with pytest.raises(FormatError, match=f"cannot be read as a .*: {words}") as refused:
            plan(str(file), ConvertOptions("dcp"))
        assert "a dict with keys of text" in str(refused.value.hint)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FormatError, match="it was cut short or changed"):
        plan(str(file), ConvertOptions("dcp"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pointer_of_git_lfs_is_called_one(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a clone without the large files; the folder, and the file alone."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    (folder / "model.safetensors").unlink()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    paths = [folder / file] if file == "model.pt" else [folder, folder / file]
    for path in paths:
        for command in (["show", str(path)], ["convert", str(path), str(tmp_path / "out")]):
            assert main(command) != 0
            error = capsys.readouterr().err
            assert "a pointer of Git LFS, not the weights\nhint: `git lfs pull`" in error
        assert main(["verify", str(path)]) != 0
        said = capsys.readouterr()
        assert "a pointer of Git LFS, not the weights" in said.out + said.err


def test_a_folder_that_is_no_checkpoint_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: weights of another framework."""
    for file in ("config.json", "flax_model.msgpack"):
        (tmp_path / file).write_text("{}")
    assert main(["show", str(tmp_path)]) == 4
    assert "no safetensors; found: config.json, flax_model.msgpack\n" in capsys.readouterr().err


def test_an_adapter_beside_a_model_is_ignored_with_a_note(tmp_path: Path) -> None:
    """Method: a folder as torchtune writes it: both, in a numbered file without an index."""
    tensors = hf_tensors(LLAMA)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    adapter = save_adapter(tmp_path / "peft", low_rank(tensors, {"model.layers.0.mlp.up_proj": 2}))
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    planned = plan(str(folder), ConvertOptions("hf"))
    assert {*planned.outputs} == {*tensors}
    assert "`adapter_model.safetensors` is an adapter, and is ignored" in planned.notes


def test_checkpoints_of_meta_and_the_cache_of_the_hub_are_found(tmp_path: Path) -> None:
    """Method: one file of Meta, and two that divide the tensors, of which one alone has a note; a
    cache with two snapshots, of which the main branch has one."""
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text("{}")
    torch.save({"tok_embeddings.weight": torch.ones(2, 2)}, meta / "consolidated.00.pth")
    assert len(plan(str(meta), ConvertOptions("dcp")).outputs) == 1
    shutil.copy(meta / "consolidated.00.pth", meta / "consolidated.01.pth")
    with pytest.raises(NotFoundError, match="divided over 2 ranks of tensor parallelism"):
        plan(str(meta), ConvertOptions("dcp"))
    (note,) = plan(str(meta / "consolidated.01.pth"), ConvertOptions("dcp")).notes
    assert "one of 2 files, each of which has a part of most tensors" in note

    cache = tmp_path / "models--org--name"
    for name in ("first", "second"):
        save_folder(cache / "snapshots" / name, LLAMA, hf_tensors(LLAMA))
    (cache / "blobs").mkdir()
    with pytest.raises(NotFoundError, match="which holds 2: `snapshots/first`"):
        plan(str(cache), ConvertOptions("hf"))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("first")
    notes = plan(str(cache), ConvertOptions("hf")).notes
    assert any("snapshots/first" in note for note in notes)


@pytest.mark.parametrize(
    ("source", "target", "number"),
    [
        (torch.float32, "float16", 1e6),
        (torch.bfloat16, "float16", -1e6),
        (torch.float64, "float32", 1e300),
        (torch.float32, "bfloat16", 3.4e38),
    ],
    ids=str,
)
def test_a_number_that_is_too_large_for_the_dtype_is_refused(
    source: torch.dtype, target: Any, number: float, tmp_path: Path
) -> None:
    """G10. Method: it would become infinite. Numbers that are infinite or NaN already stay so, and
    nothing is left behind."""
    tensors = {"w": torch.tensor([1.0, float("inf"), float("nan")], dtype=source)}
    torch.save(tensors, tmp_path / "good.pt")
    options = ConvertOptions("dcp", dtype=target)
    convert(plan(str(tmp_path / "good.pt"), options), str(tmp_path / "step-0"))
    tensors["w"][0] = number
    torch.save(tensors, tmp_path / "large.pt")
    planned = plan(str(tmp_path / "large.pt"), options)
    with pytest.raises(MismatchError, match=f"`w` has a number that is too large for {target}"):
        convert(planned, str(tmp_path / "step-1"))
    assert not (tmp_path / "step-1").exists()


def test_names_of_an_adapter_are_its_own(tmp_path: Path) -> None:
    """Method: a PEFT folder, whose names begin like those of a wrapper: no note offers a rule."""
    factors = low_rank({"a.weight": torch.ones(4, 3)}, {"a": 2})
    folder = save_adapter(tmp_path / "adapter", factors)
    assert not any("--rename" in note for note in plan(str(folder), ConvertOptions("dcp")).notes)


def test_nothing_of_another_program_is_found_in_an_unknown_folder(tmp_path: Path) -> None:
    """Method: a folder with a `latest` that names no folder in it."""
    (tmp_path / "run/notes").mkdir(parents=True)
    (tmp_path / "run/latest").write_bytes(b"\xff\0../../etc\n")
    with pytest.raises(NotFoundError):
        plan(str(tmp_path / "run"), ConvertOptions(to="dcp"))
