"""Exports of multimodal models keep, copy or plainly leave out their other parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_models
import hub_classes
from hf_folders import assert_same, converted, tensors_in
from holdfast.cli.main import main
from holdfast.convert.plan import ConvertOptions

PARTS = ("vision*", "multi_modal_projector*")
"""Patterns of the tensors that do not belong to the language model."""


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**hf_models.SIZES, **hf_models.WIDE},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
        },
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **hf_models.SIZES,
                **hf_models.WIDE,
                **hf_models.SPARSE,
                "num_local_experts": 4,
            },
            "vision_config": {
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "image_token_index": 60,
        },
    ),
}


@pytest.fixture(params=CONFIGS, scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small multimodal model."""
    kind, values = CONFIGS[request.param]
    with hf_models.quiet():
        config = transformers.AutoConfig.for_model(request.param, **values)
        torch.manual_seed(7)
        model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return hf_models.save(model, tmp_path_factory.mktemp(request.param) / "hf")


def opened(folder: Path, kind: str) -> Any:
    """Open a folder by a class of transformers; tensors without a value are an error."""
    with hf_models.quiet():
        cls = getattr(transformers, kind)
        model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def test_other_parts_are_kept_from_the_source_or_copied_from_the_assets(
    source: Path, tmp_path: Path
) -> None:
    """G10. Method: a checkpoint of all parts, and one of the language model, each exported with the
    folder as assets: both exports have all tensors of the folder."""
    wanted = tensors_in(source)
    assert converted(source, tmp_path / "all", ConvertOptions("dcp")) == ()
    assert converted(tmp_path / "all", tmp_path / "a", ConvertOptions("hf", str(source))) == ()
    assert_same(tensors_in(tmp_path / "a"), wanted)
    converted(source, tmp_path / "text", ConvertOptions("dcp", skip=PARTS))
    (note,) = converted(tmp_path / "text", tmp_path / "b", ConvertOptions("hf", str(source)))
    assert f"tensors of other parts are copied from `{source}`" in note
    assert_same(tensors_in(tmp_path / "b"), wanted)


def test_a_language_model_alone_gets_a_configuration_of_its_own(
    source: Path, tmp_path: Path
) -> None:
    """G10. Method: skip the other parts in an export of the folder; and export a checkpoint of the
    language model with assets that have no weights. A note says so, and transformers opens the
    export as a language model with the logits of the whole one."""
    converted(source, tmp_path / "text", ConvertOptions("dcp", skip=PARTS))
    assets = tmp_path / "assets"
    shutil.copytree(source, assets, ignore=shutil.ignore_patterns("*.safetensors*"))
    first = converted(source, tmp_path / "a", ConvertOptions("hf", skip=PARTS))
    second = converted(tmp_path / "text", tmp_path / "b", ConvertOptions("hf", str(assets)))
    config = json.loads((tmp_path / "a/config.json").read_text())
    alone = f"only the language model is exported, as {config['architectures'][0]}"
    assert config["model_type"].endswith("_text")
    tokens = torch.arange(5, 17)[None]
    whole = opened(source, json.loads((source / "config.json").read_text())["architectures"][0])
    if source.parent.name.startswith("llama4"):
        # Its forward pass fails without an image in this version of transformers.
        whole = whole.language_model
    with torch.no_grad(), hf_models.quiet():
        wanted = whole(tokens).logits
    for folder, notes in ((tmp_path / "a", first), (tmp_path / "b", second)):
        assert any(note.startswith(alone) for note in notes)
        model = opened(folder, config["architectures"][0])
        with torch.no_grad(), hf_models.quiet():
            assert torch.equal(model(tokens).logits, wanted)


def test_a_part_that_is_skipped_alone_is_said_to_be_missing(source: Path, tmp_path: Path) -> None:
    """Method: skip the projector, which loaders then fill with random values."""
    notes = converted(source, tmp_path / "a", ConvertOptions("hf", skip=PARTS[1:]))
    assert any("loaders give them random values" in note for note in notes)


def test_a_checkpoint_without_one_of_the_parts_is_completed_or_the_part_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G10. Method: a checkpoint with the projector and without the tower. With the folder as
    assets, the export has all of its tensors; without, a note and the check of the export name the
    part, which the whole folder does not lack."""
    converted(source, tmp_path / "part", ConvertOptions("dcp", skip=PARTS[:1]))
    (note,) = converted(tmp_path / "part", tmp_path / "a", ConvertOptions("hf", str(source)))
    assert "tensors of other parts are copied from" in note
    assert_same(tensors_in(tmp_path / "a"), tensors_in(source))
    lacking = "`config.json` has `vision_config`, and no tensor is of it"
    (note,) = converted(tmp_path / "part", tmp_path / "b", ConvertOptions("hf"))
    assert note.startswith(lacking)
    for folder, lacks in ((source, False), (tmp_path / "b", True)):
        assert main(["verify", str(folder), "--as-export"]) == (6 if lacks else 0)
        assert (lacking in capsys.readouterr().out) == lacks


def test_a_part_that_is_skipped_without_a_table_is_said_to_be_missing(tmp_path: Path) -> None:
    """Method: a model whose tensors keep their names, without its tower."""
    source = hf_models.save(hub_classes.build("llava"), tmp_path / "hf")
    notes = converted(source, tmp_path / "a", ConvertOptions("hf", skip=("*vision_tower*",)))
    assert "`--skip`, which loaders give random values if the model has them" in notes[0]
    assert notes[-1].startswith("`config.json` has `vision_config`, and no tensor is of it")
