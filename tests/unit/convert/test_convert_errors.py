"""Refused conversions: all differences are listed before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import holdfast
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.cli.main import main
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import (
    DamagedError,
    FormatError,
    HoldfastError,
    MismatchError,
    NotFoundError,
    UsageError,
)
from holdfast.hf.published import published

DCP = ConvertOptions(to="dcp")


def refused(
    folder: Path, options: ConvertOptions = DCP, kind: type[HoldfastError] = MismatchError
) -> str:
    with pytest.raises(kind) as raised:
        plan(str(folder), options)
    return str(raised.value)


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path: Path) -> None:
    """G6: three tensors of each kind, all of them in the message."""
    tensors = hf_tensors(LLAMA)
    gone = [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)] + ["model.norm.weight"]
    for name in gone:
        del tensors[name]
    cut = ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    for name in cut:
        tensors[name] = tensors[name][:8].contiguous()
    strange = ["visual.patch.weight", "model.layers.0.extra", "bias"]
    tensors |= {name: torch.ones(2) for name in strange}
    message = refused(save_folder(tmp_path / "hf", LLAMA, tensors))
    assert "9 differences" in message
    assert all(f"`{name}`" in message for name in (*gone, *cut, *strange))
    assert "has shape [8, 32], expected [32, 32]" in message


def test_many_differences_are_merged_by_layer_and_expert(tmp_path: Path) -> None:
    """Method: weights of eight layers where the configuration has two, with too many experts; and
    weights of two layers where it has forty."""
    config = published("qwen3_moe", "debugmodel", 64)
    more = {**config, "num_hidden_layers": 8, "num_experts": 10}
    source = save_folder(tmp_path / "hf", config | {"num_hidden_layers": 2}, hf_tensors(more))
    message = refused(source)
    assert "`model.layers.{2-7}.mlp.experts.{0-9}.up_proj.weight` is beyond the 2 layers" in message
    assert "`model.layers.{0-1}.mlp.experts.{8-9}.up_proj.weight` is unexpected" in message
    source = save_folder(tmp_path / "short", LLAMA | {"num_hidden_layers": 40}, hf_tensors(LLAMA))
    message = refused(source)
    assert "342 differences" in message
    assert "`model.layers.{2-39}.mlp.up_proj.weight` is missing" in message
    assert "more" not in message


def test_layers_beyond_the_configuration_are_named_as_such(tmp_path: Path) -> None:
    """Method: weights of three layers, a configuration of two."""
    tensors = hf_tensors({**LLAMA, "num_hidden_layers": 3})
    message = refused(save_folder(tmp_path / "hf", LLAMA, tensors))
    assert message.count("`model.layers.2.") == message.count("is beyond the 2 layers of") == 9


def test_a_flavor_that_contradicts_config_json_is_refused(tmp_path: Path) -> None:
    """Method: a small model with flavor 8B, and with the name of another family."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    message = refused(folder, ConvertOptions(to="dcp", model_name="llama3", model_flavor="8B"))
    assert "num_hidden_layers is 2 and 32" in message
    assert "hidden_size is 32 and 4096" in message
    message = refused(
        folder, ConvertOptions(to="dcp", model_name="qwen3_moe", model_flavor="30B-A3B")
    )
    assert "model_type is llama and qwen3_moe" in message
    message = refused(folder, ConvertOptions(to="dcp", model_name="llama4"))
    assert "model_type is llama and llama4_text or llama4" in message
    message = refused(folder, ConvertOptions(to="dcp", model_flavor="8B"), UsageError)
    assert "needs `--model-name`" in message


@pytest.mark.parametrize("alike", [True, False])
def test_a_tied_model_refuses_a_head_that_differs_from_the_embedding(
    tmp_path: Path, alike: bool
) -> None:
    """Method: a tied configuration beside weights with a head: one that equals the embedding is
    accepted as its second name, another is refused."""
    tensors = hf_tensors(LLAMA)
    if alike:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = save_folder(tmp_path / "hf", {**LLAMA, "tie_word_embeddings": True}, tensors)
    if alike:
        outputs = plan(str(folder), DCP).outputs
        assert outputs["output.weight"].same_as == "tok_embeddings.weight"
    else:
        assert "`lm_head.weight` and `model.embed_tokens.weight` differ" in refused(folder)


def test_a_tensor_in_two_files_is_refused_with_or_without_an_index(tmp_path: Path) -> None:
    """Method: two tensors in both of two files; then an index that has one file for each."""
    tensors = hf_tensors(LLAMA)
    twice = ["model.norm.weight", "lm_head.weight"]
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    single = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    save_file({name: tensors[name] for name in twice}, folder / "more.safetensors")
    message = refused(folder, kind=FormatError)
    assert all(f"`{name}` is in" in message for name in twice)
    single.rename(folder / "model.safetensors")
    index = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "more.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    message = refused(folder, kind=FormatError)
    assert "`lm_head.weight` is in `more.safetensors`, which the index does not say" in message
    assert "`model.norm.weight` is in `model.safetensors`" in message


def test_a_file_outside_the_index_is_ignored_with_a_note(tmp_path: Path) -> None:
    """Method: a file with other values under the same names, whose name sorts first."""
    tensors = hf_tensors(LLAMA)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors, num_files=2)
    save_file({name: t + 1 for name, t in tensors.items()}, folder / "a.safetensors")
    planned = plan(str(folder), DCP)
    assert any("`a.safetensors` is not in the index" in note for note in planned.notes)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(folder, kind=DamagedError)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_files_beside_a_single_one_are_ignored_with_a_note(stem: str, tmp_path: Path) -> None:
    """Method: another variant, and the same weights by the names of another program, beside the
    file that transformers or diffusers opens."""
    tensors = hf_tensors(LLAMA)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    (folder / "model.safetensors").rename(folder / f"{stem}.safetensors")
    save_file({n: t.half() for n, t in tensors.items()}, folder / f"{stem}.fp16.safetensors")
    save_file({f"x.{n}": t for n, t in tensors.items()}, folder / "consolidated.safetensors")
    planned = plan(str(folder), DCP)
    assert len(planned.outputs) == len(tensors)
    assert {output.dtype for output in planned.outputs.values()} == {"float32"}
    for ignored in (f"{stem}.fp16", "consolidated"):
        note = f"`{ignored}.safetensors` is beside `{stem}.safetensors`, and is ignored"
        assert note in planned.notes


def test_skipped_tensors_are_left_out_with_a_note(tmp_path: Path) -> None:
    """Method: tensors of a larger model, a buffer that follows from the configuration, a pattern
    that matches nothing."""
    tensors = hf_tensors(LLAMA)
    tensors |= {"vision.a": torch.ones(2), "vision.b": torch.ones(2)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = save_folder(tmp_path / "hf", LLAMA, tensors)
    assert "`vision.a`" in refused(folder)
    planned = plan(str(folder), ConvertOptions(to="dcp", skip=("vision.*",)))
    assert "left out 2 tensors that match `--skip`" in planned.notes
    assert any("buffers" in note for note in planned.notes)
    assert not any("vision" in name or "inv_freq" in name for name in planned.outputs)
    message = refused(folder, ConvertOptions(to="dcp", skip=("audio.*",)), UsageError)
    assert "`--skip audio.*` matches no tensor" in message


def test_a_missing_or_unsupported_configuration_is_refused_with_a_hint(
    tmp_path: Path,
) -> None:
    """Method: weights without `config.json`, with a model type without a table, whose names
    cannot change, without a size, with
    a list in place of an object; a path without anything; tensors with unknown names."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    (folder / "config.json").unlink()
    assert "--hf-assets" in refused(folder, kind=UsageError)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert any("'bert'" in note for note in plan(str(folder), DCP).notes)
    assert "'bert'" in refused(folder, ConvertOptions(to="dcp", names="meta"), UsageError)
    (folder / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 4}')
    assert "hidden_size" in refused(folder, kind=FormatError)
    (folder / "config.json").write_text("[1]")
    assert "no configuration" in refused(folder, kind=FormatError)
    assert "nothing at" in refused(tmp_path / "nowhere", kind=NotFoundError)
    strangers: dict[str, Tensor] = {"weight": torch.ones(2, 2)}
    torch.save(strangers, tmp_path / "strange.pt")
    message = refused(tmp_path / "strange.pt", ConvertOptions(to="hf"), UsageError)
    assert "names of no supported model" in message


def test_tensors_of_another_model_than_the_assets_are_named(tmp_path: Path) -> None:
    """Method: names that neither Meta nor Hugging Face has, with the assets of a family. The hint
    does not ask for the assets that were given."""
    holdfast.save(tmp_path / "step-1", {"0.weight": torch.ones(2), "0.bias": torch.ones(2)})
    assets = save_folder(tmp_path / "assets", LLAMA, hf_tensors(LLAMA))
    options = ConvertOptions("hf", hf_assets=str(assets))
    message = refused(tmp_path / "step-1", options, UsageError)
    assert "do not have the names of `" in message
    assert "a model of type 'llama': `0.weight`, `0.bias`" in message
    assert "--rename 'THEIRS=OURS'" in message


def test_a_file_in_place_of_the_assets_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    options = ConvertOptions("hf", hf_assets=str(folder / "config.json"))
    assert "must be a folder, found: a file" in refused(folder, options, UsageError)


def test_an_export_has_no_native_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option is refused, instead of doing nothing."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    command = ["convert", str(folder), str(tmp_path / "out"), "--to", "hf", "--names", "titan"]
    assert main(command) == 2
    assert "leave out `--names`, or `--to dcp`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
