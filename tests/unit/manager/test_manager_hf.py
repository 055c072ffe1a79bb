"""The manager loads and exports Hugging Face folders, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_folders import hf_tensors, save_folder
from holdfast.catalog.catalog import Catalog
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import HoldfastError, MismatchError, NotFoundError, UsageError
from holdfast.hf.export import HFModel
from holdfast.hf.flavors import MODELS, Flavor, config_of
from holdfast.manager.config import CheckpointConfig
from holdfast.manager.manager import CheckpointManager
from holdfast.storage.local import LocalStore
from holdfast.trainer.model import Transformer

FLAVOR = replace(MODELS["llama3"]["debugmodel"], dim=32, num_layers=2, hidden_dim=48)
CONFIG = config_of("llama3", FLAVOR, 64)


def model_of(flavor: Flavor = FLAVOR, seed: int = 1) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(flavor, vocab_size=64, seq_len=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def manager_of(
    folder: Path, model: Transformer, hub: HFModel | None, **settings: Any
) -> CheckpointManager:
    config = CheckpointConfig(enable=True, interval=2, **settings)
    return CheckpointManager(folder, model=model, config=config, hub=hub)


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
@pytest.mark.parametrize("tied", [False, True])
def test_exports_have_their_own_interval_and_may_replace_the_last_checkpoint(
    mode: str, tied: bool, tmp_path: Path
) -> None:
    """Method: a checkpoint every 2 steps, an export every 3 and, from the same snapshot, at 6; the
    last checkpoint is an export. Each holds the weights of its step; the next run finds that the
    run is finished. A checkpoint holds the configuration of its model, so that `convert` needs
    none."""
    flavor = replace(FLAVOR, tied=tied)
    model, hub = model_of(flavor), HFModel(config_of("llama3", flavor, 64))
    settings = {"hf_export_interval": 3, "last_save_in_hf": True, "async_mode": mode}
    wanted: dict[int, torch.Tensor] = {}
    with manager_of(tmp_path, model, hub, **settings) as manager:
        for step in range(1, 8):
            with torch.no_grad():
                manager.wait_for_staging()
                model.state_dict()["norm.weight"].fill_(step)
            wanted[step] = torch.full((32,), float(step))
            manager.save(step, last_step=step == 7)
    assert Catalog(LocalStore(tmp_path)).steps() == [2, 4, 6, 7]
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"step-3", "step-6"}
    for folder, step in (("hf/step-3", 3), ("hf/step-6", 6), ("step-7", 7)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert torch.equal(found["model.norm.weight"], wanted[step])
        assert ("lm_head.weight" in found) != tied
    options = ConvertOptions(to="hf", model_only=True)
    convert(plan(str(tmp_path / "step-4"), options), str(tmp_path / "told"))
    told = json.loads((tmp_path / "told/config.json").read_bytes())
    assert told == json.loads((tmp_path / "hf/step-3/config.json").read_bytes())
    found = load_file(tmp_path / "told/model.safetensors")
    assert torch.equal(found["model.norm.weight"], wanted[4])
    with manager_of(tmp_path, model, hub, **settings) as manager:
        assert manager.final_step() == 7
        assert manager.load() == 6


def test_a_hugging_face_folder_is_loaded_if_there_is_nothing_to_resume(tmp_path: Path) -> None:
    """Method: from `initial_load_path`, then from the assets; a later checkpoint of the run is
    preferred."""
    folder = save_folder(tmp_path / "hf", CONFIG, hf_tensors(CONFIG), num_files=2)
    for number, (path, assets) in enumerate([(str(folder), None), (None, str(folder))]):
        model = model_of(seed=number)
        settings = {"initial_load_in_hf": True, "initial_load_path": path}
        where = tmp_path / f"run-{number}"
        with manager_of(where, model, HFModel(CONFIG, assets), **settings) as manager:
            assert manager.load() == 0
            given = hf_tensors(CONFIG)
            assert torch.equal(model.state_dict()["norm.weight"], given["model.norm.weight"])
            assert torch.equal(model.state_dict()["output.weight"], given["lm_head.weight"])
            manager.save(2)
        with manager_of(where, model_of(), HFModel(CONFIG, assets), **settings) as manager:
            assert manager.load() == 2


def test_a_quantized_folder_is_dequantized_as_it_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: fp8 in blocks of 16 x 16, compared with a factor for each element. A folder that is
    declared quantized and is not is loaded, with a note in the log."""
    settings: dict[str, Any] = {"initial_load_in_hf": True, "initial_load_in_hf_quantized": True}
    tensors, name = hf_tensors(CONFIG), "model.layers.0.mlp.up_proj.weight"
    plain = save_folder(tmp_path / "plain", CONFIG, tensors)
    quantized, scale = tensors[name].to(torch.float8_e4m3fn), torch.rand(3, 2)
    tensors |= {name: quantized, f"{name}_scale_inv": scale}
    config = {**CONFIG, "quantization_config": {"weight_block_size": [16, 16]}}
    folder = save_folder(tmp_path / "hf", config, tensors)
    model = model_of()
    with caplog.at_level("INFO", "holdfast"):
        path = {"initial_load_path": str(folder)}
        with manager_of(tmp_path / "run", model, None, **settings, **path) as manager:
            manager.load()
    factors = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    found = model.state_dict()["layers.0.feed_forward.w3.weight"]
    assert torch.equal(found, quantized.float() * factors)
    assert "1 quantized tensors are dequantized" in caplog.text
    with caplog.at_level("INFO", "holdfast"):
        path = {"initial_load_path": str(plain)}
        with manager_of(tmp_path / "again", model, None, **settings, **path) as manager:
            manager.load()
    assert "no tensor is quantized" in caplog.text


def test_a_folder_with_the_names_of_a_wrapper_is_refused_with_the_command_that_renames_them(
    tmp_path: Path,
) -> None:
    """Method: names that torch.compile changes; and a checkpoint in place of a folder."""
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in hf_tensors(CONFIG).items()}
    folder = save_folder(tmp_path / "hf", CONFIG, tensors)
    model = model_of()
    with manager_of(tmp_path / "one", model, None) as manager:
        manager.save(2)
    for path, kind, hint in (
        (folder, MismatchError, f"holdfast convert {folder} RENAMED --to hf --rename '_orig_mod='"),
        (tmp_path / "one/step-2", UsageError, "leave out `initial_load_in_hf`"),
    ):
        settings = {"initial_load_in_hf": True, "initial_load_path": str(path)}
        with (
            manager_of(tmp_path / "run", model, None, **settings) as manager,
            pytest.raises(kind) as refused,
        ):
            manager.load()
        assert str(refused.value.hint).startswith(hint)


def test_an_export_says_which_numbers_its_dtype_cannot_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: one number beyond float16: the run goes on, and the log names the tensor."""
    model = model_of()
    with torch.no_grad():
        model.state_dict()["layers.0.attention.wq.weight"][0, 0] = 1e6
    settings = {"hf_export_interval": 1, "export_dtype": "float16"}
    with (
        caplog.at_level("WARNING", "holdfast"),
        manager_of(tmp_path, model, HFModel(CONFIG), **settings) as manager,
    ):
        manager.save(1)
    found = load_file(tmp_path / "hf/step-1/model.safetensors")
    assert [n for n, t in found.items() if t.isinf().any()] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert "`model.layers.0.self_attn.q_proj.weight` have numbers that are too large" in caplog.text


class _Loader:
    """A data loader whose state has the length of its sequences, as that of the reference run."""

    def state_dict(self) -> dict[str, Any]:
        return {"seq_len": 64}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


def test_an_export_says_that_its_configuration_allows_longer_inputs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Method: exports of a run and of its checkpoint, with a training length below and at
    `max_position_embeddings`, and of unknown length."""
    note = "`max_position_embeddings` is {}, and this run trained on sequences of 64 tokens"
    for number, (positions, seq_len) in enumerate(((65, 64), (64, 64), (65, None))):
        caplog.clear()
        config = {**CONFIG, "max_position_embeddings": positions}
        with (
            caplog.at_level("INFO", "holdfast"),
            CheckpointManager(
                tmp_path / f"run-{number}",
                model=model_of(),
                dataloader=_Loader() if seq_len else None,
                config=CheckpointConfig(enable=True, interval=1, hf_export_interval=1),
                hub=HFModel(config, seq_len=seq_len),
            ) as manager,
        ):
            manager.save(1)
        wanted = positions > 64 and seq_len is not None
        assert (note.format(positions) in caplog.text) == wanted
        planned = plan(str(tmp_path / f"run-{number}/step-1"), ConvertOptions("hf"))
        assert (note.format(positions) in "\n".join(planned.notes)) == wanted


def test_a_failed_load_or_export_changes_nothing(tmp_path: Path) -> None:
    """Method: no folder; a folder of another size; a damaged file; a model that does not fit the
    configuration, whose export leaves nothing; settings that exclude each other."""
    loading: dict[str, Any] = {"initial_load_in_hf": True}
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(kind: type[HoldfastError], path: Path | None) -> str:
        settings = {**loading, "initial_load_path": None if path is None else str(path)}
        with (
            manager_of(tmp_path / "run", model, None, **settings) as manager,
            pytest.raises(kind) as raised,
        ):
            manager.load()
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        return str(raised.value)

    assert "--model.hf_assets_path" in refused(UsageError, None)
    assert "nothing at" in refused(NotFoundError, tmp_path / "nowhere")
    other = {**CONFIG, "num_hidden_layers": 3}
    larger = save_folder(tmp_path / "larger", other, hf_tensors(other))
    assert "layers.2.attention.wq.weight` is in the checkpoint, but not wanted" in refused(
        MismatchError, larger
    )
    (larger / "config.json").write_text(json.dumps(CONFIG))
    assert "is beyond the 2 layers" in refused(MismatchError, larger)

    for layers, told in ((3, r"2\.attention\.wq\.weight` is missing"), (1, r"1\..*` is beyond")):
        hub = HFModel({**CONFIG, "num_hidden_layers": layers})
        with pytest.raises(MismatchError, match=rf"cannot be exported:\n(.*\n)* .`layers\.{told}"):
            manager_of(tmp_path / "run", model, hub, last_save_in_hf=True)
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
    with pytest.raises(UsageError, match="need to know the model"):
        manager_of(tmp_path / "run", model, None, hf_export_interval=1)


def test_a_model_that_gets_its_memory_later_is_checked_at_the_export(tmp_path: Path) -> None:
    """Method: the manager is made while the model is on the meta device. The model has a layer
    fewer than the configuration."""
    with torch.device("meta"):
        model = Transformer(FLAVOR, vocab_size=64, seq_len=8)
    hub = HFModel({**CONFIG, "num_hidden_layers": 3})
    with manager_of(tmp_path, model, hub, last_save_in_hf=True) as manager:
        model.to_empty(device="cpu")
        with pytest.raises(MismatchError, match="cannot be exported"):
            manager.save(2, last_step=True)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "settings",
    [
        {"hf_export_interval": -1},
        {"last_save_in_hf": True, "last_save_model_only": False},
        {"initial_load_in_hf": True, "initial_load_model_only": False},
        {"initial_load_in_hf_quantized": True},
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="checkpoint"):
        CheckpointConfig(enable=True, **settings)


def test_weights_with_other_values_are_refused_or_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """G10. Method: a Hugging Face folder and a checkpoint, both trained with other values, as
    initial weights; the checkpoint to resume from. A run whose model has exactly the values of its
    configuration refuses them; another one warns. Every value is named."""
    trained = {**CONFIG, "rope_theta": 10000.0, "rms_norm_eps": 1e-3}
    folder = save_folder(tmp_path / "hf", trained, hf_tensors(CONFIG))
    with manager_of(tmp_path / "run", model_of(), HFModel(trained)) as manager:
        manager.save(2)
    starts: list[dict[str, Any]] = [
        {"initial_load_in_hf": True, "initial_load_path": str(folder)},
        {"initial_load_path": str(tmp_path / "run/step-2")},
        {},
    ]
    for number, settings in enumerate(starts):
        where = tmp_path / ("run" if not settings else f"other-{number}")
        hub = HFModel(CONFIG, exact=True)
        with (
            manager_of(where, model_of(), hub, **settings) as manager,
            pytest.raises(MismatchError, match="trained with other values") as raised,
        ):
            manager.load()
        for line in ("`rms_norm_eps` is 0.001 and 1e-05", "`rope_theta` is 10000.0 and 500000.0"):
            assert line in str(raised.value)
        caplog.clear()
        with manager_of(where, model_of(), HFModel(CONFIG), **settings) as manager:
            manager.load()
        assert caplog.text.count("was trained with another value") == 2
        with manager_of(where, model_of(), HFModel(trained, exact=True), **settings) as manager:
            manager.load()


def test_the_values_of_a_multimodal_model_are_those_of_its_language_model(tmp_path: Path) -> None:
    """G10. Method: a run resumes with another `text_config` than the checkpoint has."""
    config: dict[str, Any] = {"model_type": "gemma3", "text_config": CONFIG}
    trained = {**config, "text_config": {**CONFIG, "rope_theta": 10000.0, "rms_norm_eps": 1e-3}}
    with manager_of(tmp_path, model_of(), HFModel(trained)) as manager:
        manager.save(2)
    with (
        manager_of(tmp_path, model_of(), HFModel(config, exact=True)) as manager,
        pytest.raises(MismatchError, match="trained with other values") as raised,
    ):
        manager.load()
    for line in ("`rms_norm_eps` is 0.001 and 1e-05", "`rope_theta` is 10000.0 and 500000.0"):
        assert line in str(raised.value)
    with manager_of(tmp_path, model_of(), HFModel(trained, exact=True)) as manager:
        assert manager.load() == 2
