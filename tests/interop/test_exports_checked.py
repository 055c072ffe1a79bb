"""`holdfast verify --as-export` finds the mistakes at which loaders fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_models
from holdfast.cli.main import main
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan

TOKENS = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 63}, "merges": []}, "added_tokens": []}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete export of a small model, in several files."""
    home = tmp_path_factory.mktemp("export")
    source = hf_models.save(hf_models.make("llama"), home / "source")
    (source / "tokenizer.json").write_text(json.dumps(TOKENS))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    options = ConvertOptions("hf", max_shard_bytes=20_000)
    convert(plan(str(source), options), str(home / "export"))
    return home / "export"


def test_a_complete_export_is_good_and_has_the_logits_of_its_source(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G10. Method: an export, and one in bfloat16, against the folder that they come from; another
    model against the same."""
    source = export.parent / "source"
    assert main(["verify", str(export), "--as-export", "--against", str(source)]) == 0
    said = capsys.readouterr().out
    assert f"{export}: loaders find everything in place" in said
    assert "logits: largest difference 0.0e+00" in said
    assert "note: no " not in said
    small = tmp_path / "small"
    convert(plan(str(source), ConvertOptions("hf", dtype="bfloat16")), str(small))
    assert main(["verify", str(small), "--as-export", "--against", str(source)]) == 0
    capsys.readouterr()
    other = hf_models.save(hf_models.make("llama-biased"), tmp_path / "other")
    assert main(["verify", str(other), "--as-export", "--against", str(source), "--json"]) == 6
    said = json.loads(capsys.readouterr().out)
    assert "the logits differ" in said["export"]["wrong"][0]
    assert any(note.startswith("no tokenizer") for note in said["export"]["notes"])


def edited(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return a function that changes a file of JSON in a folder."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return edit


def without_format(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file), file)


def in_int8(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


CONFIG = "config.json"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "`config.json` is missing"),
    "no class": (edited(CONFIG, lambda c: c.pop("architectures")), "has no `architectures`"),
    "dtype": (edited(CONFIG, lambda c: c.update(dtype="float16")), "says 'float16', but most"),
    "layers": (edited(CONFIG, lambda c: c.update(num_hidden_layers=3)), "layers.2."),
    "words": (edited(CONFIG, lambda c: c.update(vocab_size=65)), "the embedding has 64 rows"),
    "not quantized": (
        edited(CONFIG, lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        "quantized by 'gptq', but no tensor is",
    ),
    "quantized": (in_int8, "are int8, but `config.json` has no `quantization_config`"),
    "size": (
        edited("model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1)),
        "says that the tensors have 1 bytes, found: ",
    ),
    "format": (without_format, "lacks `{'format': 'pt'}`"),
    "token": (
        edited("tokenizer.json", lambda t: t["model"]["vocab"].update(c=64)),
        "has token 64, but the embedding has 64 rows",
    ),
    "added token": (
        edited("tokenizer.json", lambda t: t["added_tokens"].append({"id": 70})),
        "has token 70",
    ),
    "end": (
        edited("generation_config.json", lambda g: g.update(eos_token_id=[2, 99])),
        "`eos_token_id` is 99, but the embedding has 64 rows",
    ),
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "is no JSON"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_of_an_export_is_named(
    mistake: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G6. Method: a good export with one mistake; the status is that of a mismatch."""
    make, expected = MISTAKES[mistake]
    folder = tmp_path / "export"
    shutil.copytree(export, folder)
    make(folder)
    assert main(["verify", str(folder), "--as-export"]) == 6
    said = capsys.readouterr()
    assert expected in said.out
    assert " mistake" in said.err


def test_only_a_whole_model_is_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G6: a checkpoint; `--against` alone."""
    source = hf_models.save(hf_models.make("llama"), tmp_path / "hf")
    convert(plan(str(source), ConvertOptions("dcp")), str(tmp_path / "step-0"))
    assert main(["verify", str(tmp_path / "step-0"), "--as-export"]) == 2
    assert "must be a Hugging Face folder" in capsys.readouterr().err
    assert main(["verify", str(source), "--against", str(source)]) == 2
    assert "`--against` needs `--as-export`" in capsys.readouterr().err
    step = str(tmp_path / "step-0")
    assert main(["verify", str(source), "--as-export", "--against", step]) == 2
    assert f"holdfast convert {step} original --to hf" in capsys.readouterr().err


def test_experts_as_in_memory_and_an_end_beyond_the_words_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a folder with the experts of a layer in one tensor, and one with each; a token that
    ends texts and that the embedding does not have."""
    model = hf_models.make("qwen3-moe")
    separate = hf_models.save(model, tmp_path / "separate")
    fused = Path(shutil.copytree(separate, tmp_path / "fused"))
    with hf_models.quiet():
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    for folder, is_fused in ((separate, False), (fused, True)):
        (folder / "generation_config.json").unlink(missing_ok=True)
        assert main(["verify", str(folder), "--as-export"]) == 0
        assert ("experts of a layer are in one tensor" in capsys.readouterr().out) == is_fused
    edited(CONFIG, lambda config: config.update(eos_token_id=[2, 64]))(separate)
    assert main(["verify", str(separate), "--as-export"]) == 6
    said = capsys.readouterr().out
    assert "`config.json`: `eos_token_id` is 64, but the embedding has 64 rows" in said
