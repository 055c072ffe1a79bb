"""Models that keep their names: of a family without a table, and live transformers models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import hf_models
import hub_classes
from extent import some
from hf_folders import assert_same, converted, tensors_in
from holdfast.cli.main import main
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import FormatError, MismatchError, UsageError
from holdfast.hf.export import HFModel
from holdfast.loading.checkpoint import open_checkpoint
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager

NOTE = "no table has the names of 'BertLMHeadModel': the tensors keep theirs"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save(made("bert"), tmp_path_factory.mktemp("bert") / "hf")


def made(name: str, seed: int = 7) -> Any:
    """Return a small model with random weights, of `hf_models` or of any architecture."""
    model = hf_models.make(name) if name in hf_models.MODELS else hub_classes.build(name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    return model


def test_a_model_without_a_table_converts_in_every_direction(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G10. Method: from the folder to a folder of several files in bfloat16; to a checkpoint; from
    there to a `.pt` file and, with and without assets, to a folder. One note says that the names
    stay. `diff` finds folder and checkpoint equal."""
    wanted = tensors_in(bert)
    options = ConvertOptions("hf", dtype="bfloat16", max_shard_bytes=20_000)
    assert NOTE in converted(bert, tmp_path / "small", options)
    assert len([*(tmp_path / "small").glob("*.safetensors")]) > 1
    in_bfloat16 = {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted.items()}
    assert_same(tensors_in(tmp_path / "small"), in_bfloat16)
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["dtype"] == "bfloat16"

    step = tmp_path / "seed/step-0"
    assert converted(bert, step, ConvertOptions("dcp")) == (NOTE,)
    assert main(["diff", str(bert), str(step)]) == 0
    capsys.readouterr()
    for assets in (str(bert), None):
        back = tmp_path / f"back-{assets is None}"
        assert converted(step, back, ConvertOptions("hf", hf_assets=assets)) == (NOTE,)
        assert_same(tensors_in(back), wanted)
    converted(step, tmp_path / "model.pt", ConvertOptions("torch"))
    assert_same(torch.load(tmp_path / "model.pt", weights_only=True), wanted)
    from_file = ConvertOptions("hf", hf_assets=str(bert))
    assert converted(tmp_path / "model.pt", tmp_path / "from-file", from_file) == (NOTE,)
    assert_same(tensors_in(tmp_path / "from-file"), wanted)


def test_names_of_another_dialect_need_a_table(bert: Path, tmp_path: Path) -> None:
    """G6: `--names` on a model without one; native names with the assets of such a model; assets of
    a model that has one."""
    with pytest.raises(UsageError, match="`--names titan` needs a table: no table has the names"):
        plan(str(bert), ConvertOptions("dcp", names="titan"))
    llama = hf_models.save(hf_models.make("llama"), tmp_path / "llama")
    with pytest.raises(MismatchError, match="model_type is 'bert' and 'llama'"):
        plan(str(bert), ConvertOptions("hf", hf_assets=str(llama)))
    converted(llama, tmp_path / "step-0", ConvertOptions("dcp"))
    with pytest.raises(FormatError, match="unsupported model_type: 'bert'"):
        plan(str(tmp_path / "step-0"), ConvertOptions("hf", hf_assets=str(bert)))


def test_a_second_name_of_a_tied_tensor_is_not_exported(tmp_path: Path) -> None:
    """Method: a checkpoint of the whole state dict of a model without a table, and a `.pt` file of
    it. Exports have what `save_pretrained` writes."""
    model = made("gpt2")
    source = hf_models.save(model, tmp_path / "hf")
    assert len(model.state_dict()) == len(tensors_in(source)) + 1
    torch.save(model.state_dict(), tmp_path / "all.pt")
    with CheckpointManager(
        tmp_path / "run", model=model, config=CheckpointConfig(enable=True, interval=1)
    ) as manager:
        manager.save(1)
    for step in (tmp_path / "run/step-1", tmp_path / "all.pt"):
        back = tmp_path / f"from-{step.name}"
        options = ConvertOptions("hf", hf_assets=str(source), model_only=True)
        converted(step, back, options)
        assert_same(tensors_in(back), tensors_in(source))


@pytest.mark.parametrize(
    "name", some(["gpt2", "qwen3-moe", "bert", "t5", "llama-tied", "gpt-oss"], 2)
)
def test_a_live_model_with_names_of_its_own_is_exported_and_loaded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G10. Method: `hub=HFModel` with a transformers model. The export has the bits of the model
    and opens with the same outputs. Another model of the class loads the folder of
    `save_pretrained`, and the export. The checkpoint needs no assets to be exported."""
    model, config = made(name), {}
    source = hf_models.save(model, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    hub = HFModel(config, str(source))
    settings: dict[str, Any] = {"enable": True, "interval": 2, "hf_export_interval": 1}
    with (
        caplog.at_level("INFO", "holdfast"),
        CheckpointManager(
            tmp_path / "run", model=model, config=CheckpointConfig(**settings), hub=hub
        ) as manager,
    ):
        manager.save(1)
        manager.save(2)
    export = tmp_path / "run/hf/step-1"
    assert any(text in caplog.text for text in ("keep theirs", "the export keeps", "are in one"))
    wanted = outputs_of(model)
    with hf_models.quiet():
        assert_same_outputs(outputs_of(type(model).from_pretrained(export).eval()), wanted)

    for folder in (source, export):
        other = made(name, seed=8)
        loading = CheckpointConfig(
            enable=True, initial_load_in_hf=True, initial_load_path=str(folder)
        )
        with CheckpointManager(
            tmp_path / f"other-{folder.name}", model=other, config=loading, hub=hub
        ) as manager:
            manager.load()
        assert_same(other.state_dict(), model.state_dict())

    options = ConvertOptions("hf", model_only=True)
    converted(tmp_path / "run/step-2", tmp_path / "later", options)
    assert_same(tensors_in(tmp_path / "later"), tensors_in(source))


def outputs_of(model: Any) -> list[Tensor]:
    outputs = hub_classes.outputs(model)
    assert outputs is not None
    return outputs


def assert_same_outputs(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_live_model_that_is_not_the_configured_one_is_not_exported(tmp_path: Path) -> None:
    """G6: a layer fewer than the configuration has, and a model with adapters: both are refused
    before any training, and nothing is left behind."""
    model = made("llama")
    config = {**model.config.to_dict(), "num_hidden_layers": 3}

    settings = CheckpointConfig(enable=True, last_save_in_hf=True)
    with pytest.raises(MismatchError, match=r"`model\.layers\.2\..* is missing"):
        CheckpointManager(tmp_path / "run", model=model, config=settings, hub=HFModel(config))
    assert not list(tmp_path.rglob("*/*"))
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with hf_models.quiet():
        adapted = peft.get_peft_model(model, lora)
    with pytest.raises(UsageError, match="a model with adapters"):
        CheckpointManager(tmp_path / "two", model=adapted, config=settings, hub=HFModel(config))


def test_a_model_with_another_head_keeps_its_names(tmp_path: Path) -> None:
    """A classifier of a family that has a table: the table has no names for its head."""
    with hf_models.quiet():
        config = transformers.LlamaConfig(**hf_models.SIZES, num_labels=3)
        model = transformers.LlamaForSequenceClassification(config).eval()
    source = hf_models.save(model, tmp_path / "hf")
    notes = converted(source, tmp_path / "seed/step-0", ConvertOptions("dcp"))
    assert notes == (
        "no table has the names of 'LlamaForSequenceClassification': the tensors keep theirs",
    )
    assert "score.weight" in open_checkpoint(tmp_path / "seed/step-0").tensors
    back = tmp_path / "back"
    converted(tmp_path / "seed/step-0", back, ConvertOptions("hf", hf_assets=str(source)))
    assert_same(tensors_in(back), tensors_in(source))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_an_export_names_the_class_of_a_model_that_was_never_saved(
    kind: str, wrap: Any, tmp_path: Path
) -> None:
    """G10. Method: a configuration without a class, as transformers makes it. The export, and one
    of the checkpoint, have the class, which also decides whether there is a table."""
    with hf_models.quiet():
        model = getattr(transformers, kind)(transformers.LlamaConfig(**hf_models.SIZES))
    config = model.config.to_dict()
    assert not config["architectures"]
    with hf_models.quiet():
        live = wrap(model)
    settings = CheckpointConfig(enable=True, interval=1, hf_export_interval=1)
    with CheckpointManager(
        tmp_path / "run", model=live, config=settings, hub=HFModel(config)
    ) as manager:
        manager.save(1)
    converted(tmp_path / "run/step-1", tmp_path / "later", ConvertOptions("hf", model_only=True))
    for folder in ("run/hf/step-1", "later"):
        found = json.loads((tmp_path / folder / "config.json").read_text())
        assert found["architectures"] == [kind]
        assert_same(tensors_in(tmp_path / folder), model.state_dict())


def test_an_export_without_a_class_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: a model that is not of transformers, with a configuration like theirs."""
    settings = CheckpointConfig(enable=True, interval=1, hf_export_interval=1)
    hub = HFModel({"model_type": "mine"})
    with (
        caplog.at_level("INFO", "holdfast"),
        CheckpointManager(
            tmp_path / "run", model=torch.nn.Linear(2, 2), config=settings, hub=hub
        ) as manager,
    ):
        manager.save(1)
    assert "`config.json` has no `architectures`" in caplog.text
    notes = plan(str(tmp_path / "run/step-1"), ConvertOptions("hf", model_only=True)).notes
    assert any("no `architectures`" in note for note in notes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_only_the_configuration_ties_is_said(
    tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: a configuration that ties the head, with a live model that does so, or not."""
    model = made("llama-tied" if tied else "llama")
    config = {**model.config.to_dict(), "tie_word_embeddings": True}
    settings = CheckpointConfig(enable=True, interval=1, hf_export_interval=1)
    with (
        caplog.at_level("INFO", "holdfast"),
        CheckpointManager(
            tmp_path / "run", model=model, config=settings, hub=HFModel(config)
        ) as manager,
    ):
        manager.save(1)
    assert ("`lm_head.weight` is a tensor of its own" in caplog.text) != tied
