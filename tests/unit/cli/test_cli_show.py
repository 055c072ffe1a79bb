"""`holdfast show`: the tree of any checkpoint, single tensors and values."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from checkpoints import save_safetensors, save_step, save_stock, save_torch
from hf_folders import save_adapter
from holdfast.cli.main import main
from holdfast.cli.picture import draw, letter
from holdfast.cli.tree import lines, tree_of
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.hf.export import HFModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each format."""
    home = tmp_path_factory.mktemp("saved")
    save_step(home / "outputs", 7)
    save_stock(home / "stock")
    save_safetensors(home / "hf")
    save_torch(home / "model.pt")
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main(["show", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def entry(dtype: str, shape: tuple[int, ...], *files: str) -> TensorEntry:
    """Returns a tensor whose rows are split evenly over files."""
    chunks = []
    for index, file in enumerate(files):
        start, stop = (shape[0] * at // len(files) for at in (index, index + 1))
        region = Region((start, *(0 for _ in shape[1:])), (stop, *shape[1:]))
        chunks.append(Chunk(region, file, Span(id(region), 1)))
    return TensorEntry(dtype, shape, tuple(chunks), ("name",))


@pytest.mark.parametrize(
    ("path", "form", "name"),
    [
        ("outputs/step-7", "checkpoint of Holdfast, step 7, full", "half  bfloat16 70x40  5.6 kB"),
        ("stock", "checkpoint of stock torch", "half  bfloat16 70x40  5.6 kB  __0_0.distcp"),
        ("hf", "safetensors, model", "a  float32 8x8  256 B  model-00001-of-00002.safetensors"),
        ("hf/model-00002-of-00002.safetensors", "safetensors, model", "c  int64 5  40 B"),
        ("model.pt", "file of torch.save, 2.4 MB", "transposed  float32 4x3  48 B  model.pt"),
    ],
)
def test_a_checkpoint_of_any_format_is_shown_as_a_tree(
    saved: Path, path: str, form: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: text, and JSON with every tensor and its chunks."""
    status, said, err = run(capsys, saved / path)
    assert (status, err) == (0, "")
    assert said.startswith(f"{saved / path}: {form}")
    assert name in said
    found: dict[str, Any] = json.loads(run(capsys, saved / path, "--json")[1])
    for tensor in found["tensors"].values():
        assert tensor["chunks"]
        assert all(chunk["file"] in found["files"] for chunk in tensor["chunks"])


def test_parameters_are_counted_by_component_and_tied_ones_once(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a state with two names for one tensor; compare with its sizes."""
    found = json.loads(run(capsys, saved / "outputs/step-7", "--json")[1])
    assert found["parts"]["model"]["elements"] == 2_300_000 + 70 * 40 + 9 * 4 + 1
    assert found["parts"]["optimizer"] == {
        "tensors": 1,
        "elements": 27000,
        "nbytes": 108000,
        "values": 1,
    }
    assert found["layout"] == {"world_size": 2}
    said = run(capsys, saved / "outputs/step-7")[1]
    assert "by 2 ranks" in said
    assert "model: 2,302,837 parameters and buffers, 2.3 MB" in said
    assert "train_state: 2 values" in said


def test_a_model_nested_under_its_own_key_is_told_from_other_components(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: nested as by Lightning, with an optimizer's state; then only the model."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save({**state, "epoch": 1}, tmp_path / "last.ckpt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    parts = json.loads(run(capsys, tmp_path / "last.ckpt", "--json")[1])["parts"]
    held = {part: found["tensors"] for part, found in parts.items()}
    assert held == {"model": 2, "optimizer_states": 6, "epoch": 0}
    alone = json.loads(run(capsys, tmp_path / "optimizer.pt", "--json")[1])["parts"]
    assert alone.keys() == {"optimizer"}
    file = str(tmp_path / "model.pt")
    assert main(["convert", str(tmp_path / "last.ckpt"), file, "--model-only"]) == 0
    found = torch.load(file, weights_only=True)
    assert found.keys() == {"state_dict"}
    assert torch.equal(found["state_dict"]["weight"], model.weight)
    assert main(["convert", str(tmp_path / "optimizer.pt"), file, "--model-only"]) == 2
    assert "has no model" in capsys.readouterr().err


def test_a_name_shows_one_tensor_and_a_prefix_shows_all_below(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a tensor, a branch, a value, and unknown names."""
    step = saved / "outputs/step-7"
    said = run(capsys, step, "model.half")[1].splitlines()
    assert said[0] == "model.half  bfloat16 70x40  5.6 kB  1 chunk in 1 file"
    assert [line.strip() for line in said[1:13]] == ["A" * 40] * 12
    assert said[13].split()[:3] == ["A", "[0:70,", "0:40]"]
    assert "_0.distcp from byte " in said[13]
    below = run(capsys, step, "model")[1]
    assert "tied_too" in below
    assert "optimizer" not in below
    status, _, err = run(capsys, step, "model.larg")
    assert (status, "similar names: model.large" in err) == (4, True)


def test_a_path_without_a_checkpoint_is_an_error_with_a_hint(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a folder of checkpoints; a folder of folders; a path that does not exist."""
    status, _, err = run(capsys, saved / "outputs")
    assert (status, f"its newest step: {saved}/outputs/step-7" in err) == (4, True)
    assert f"hint: checkpoints in it: `hf`, `stock`; {saved}/stock" in run(capsys, saved)[2]
    (saved / "empty").mkdir(exist_ok=True)
    assert "holdfast list" in run(capsys, saved / "empty")[2]
    assert run(capsys, saved / "missing")[0] == 4


def test_a_value_is_shown_in_every_format(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Method: one value, and all below a name; text and JSON."""
    for path, step in ((saved / "outputs/step-7", "7  "), (saved / "stock", "7  ")):
        status, said, err = run(capsys, path, "train_state.step")
        assert (status, err) == (0, "")
        assert said.startswith(f"train_state.step  {step}")
    assert (
        run(capsys, saved / "model.pt", "train_state.step")[1] == "train_state.step  7  model.pt\n"
    )
    said = run(capsys, saved / "outputs/step-7", "train_state")[1]
    assert "train_state.text  'valuevalue" in said
    found = json.loads(run(capsys, saved / "stock", "train_state", "--json")[1])
    assert found["contents"] == {"train_state.step": 7, "train_state.text": "value" * 100}
    assert "contents" not in json.loads(run(capsys, saved / "stock", "--json")[1])
    lines_of = run(capsys, saved / "outputs/step-7", "optimizer")[1].splitlines()
    assert lines_of[-1].startswith("optimizer.lr  0.1  ")
    assert lines_of[0].startswith("optimizer.moment  float32 300x90")
    assert run(capsys, saved / "outputs/step-7", "train_state.step", "--stats")[0] == 2


def test_a_tensor_of_one_element_is_shown_with_its_element(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: an integer beyond float64, a bool, a complex number; an empty tensor."""
    state = {"n": torch.tensor(2**60 + 1), "f": torch.tensor([[0.5]]), "b": torch.tensor(True)}
    state |= {"c": torch.tensor(1 - 2j), "many": torch.arange(3), "none": torch.ones(0)}
    holdfast.save(tmp_path / "x", state)
    for name, last in (("n", str(2**60 + 1)), ("f", "0.5"), ("b", "True"), ("c", "1-2j")):
        assert run(capsys, tmp_path / "x", name)[1].splitlines()[-1].strip() == last
    assert "from byte" in run(capsys, tmp_path / "x", "many")[1].splitlines()[-1]
    assert run(capsys, tmp_path / "x", "none")[0] == 0
    said = run(capsys, tmp_path / "x", "many", "--values")[1].splitlines()
    assert said[-1].split() == ["0", "1", "2"]


def test_a_damaged_value_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """G3. Method: change a byte of its container; then a value that is no `torch.save`
    container."""
    holdfast.save(tmp_path / "x", {"step": 7})
    file = tmp_path / "x/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    status, _, err = run(capsys, tmp_path / "x", "step")
    assert (status, "value `step` has checksum" in err) == (7, True)


def test_equal_layers_are_one_line_of_the_tree() -> None:
    """Method: three equal layers, a different one, and one more that equals the first three; then
    with `--each`."""
    tensors = {}
    for index in range(5):
        size = 8 if index == 3 else 4
        tensors[f"layers.{index}.up.weight"] = entry("float32", (size, 2), "a", "b")
        tensors[f"layers.{index}.down.weight"] = entry("float32", (2, size), "a")
    said = [line.strip() for line in lines(tree_of(tensors))]
    assert said[0] == "layers  96 elements, 384 B"
    assert said[1] == "0..2  16 elements, 64 B each  3 times"
    assert said[2] == "up.weight  float32 4x2  32 B  a, b"
    assert [line.split()[0] for line in said if "elements" in line] == ["layers", "0..2", "3", "4"]
    every = [line.strip() for line in lines(tree_of(tensors), each=True)]
    assert sum("up.weight" in line for line in every) == 5


def test_a_tensor_in_many_files_is_shown_with_the_number_of_files() -> None:
    tensors = {"weight": entry("float32", (8, 2), *map(str, range(8)))}
    assert list(lines(tree_of(tensors))) == ["weight  float32 8x2  64 B  8 chunks in 8 files"]


def test_a_picture_has_a_letter_for_each_chunk() -> None:
    """Method: split by rows, by columns, by both, along inner dims; a scalar; an empty tensor."""
    rows = [Region((0, 0), (3, 5)), Region((3, 0), (6, 5))]
    assert draw((6, 5), rows) == ["AAAAA"] * 3 + ["BBBBB"] * 3
    columns = [Region((0, 0), (2, 1)), Region((0, 1), (2, 4))]
    assert draw((2, 4), columns) == ["ABBB"] * 2
    inner = [Region((0, 0, k, 0), (9, 9, k + 1, 9)) for k in range(2)]
    assert draw((9, 9, 2, 9), inner) == ["AB"] * 9
    assert draw((), [Region((), ())]) == ["A"]
    assert draw((0, 3), [Region((0, 0), (0, 3))]) == []
    assert [letter(0), letter(51), letter(52)] == ["A", "z", "#"]


@given(st.lists(st.integers(1, 200), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 2))
def test_each_letter_of_a_picture_is_that_of_the_chunk_there(
    shape: list[int], pieces: int, dim: int
) -> None:
    """Method: any shape split along any dim. The letter of each cell belongs to the chunk with the
    element in the cell's middle, and letters are in order."""
    dim %= len(shape)
    cuts = [shape[dim] * at // pieces for at in range(pieces + 1)]
    regions = []
    for start, stop in pairwise(cuts):
        low, high = [0] * len(shape), list(shape)
        low[dim], high[dim] = start, stop
        regions.append(Region(tuple(low), tuple(high)))
    picture = draw(shape, regions)
    assert "." not in "".join(picture)
    for line in (*picture, *("".join(column) for column in zip(*picture, strict=True))):
        assert list(line) == sorted(line)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "factor": None},
}


def test_the_configuration_of_the_model_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a checkpoint of a run with a configuration, a folder of Hugging Face with one of two
    models, and a `.pt` file without one."""
    names = ("tok_embeddings.weight", "layers.0.attention.wq.weight")
    model = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in names}
    module = torch.nn.Module()
    for name, value in model.items():
        module.register_parameter(name.replace(".", "_"), value)
    config = holdfast.CheckpointConfig(enable=True, interval=1)
    with holdfast.CheckpointManager(
        tmp_path / "run", model=module, config=config, hub=HFModel(CONFIG)
    ) as manager:
        manager.save(1)
    said = run(capsys, tmp_path / "run/step-1")[1]
    assert "\n  configuration: LlamaForCausalLM, llama\n    num_hidden_layers 1, " in said
    assert "hidden_size 8, tie_word_embeddings False\n    rope_parameters: rope_type " in said
    assert "rope_theta 500000.0\n" in said
    assert json.loads(run(capsys, tmp_path / "run/step-1", "--json")[1])["config"] == CONFIG

    save_safetensors(tmp_path / "hf")
    text = {"model_type": "llama", "hidden_size": 16}
    whole = {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 4}}
    (tmp_path / "hf/config.json").write_text(json.dumps(whole))
    assert "\n  configuration: llava\n    hidden_size 16\n" in run(capsys, tmp_path / "hf")[1]

    adapter = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "org/name"}
    peft = save_adapter(tmp_path / "peft", {"base_model.model.x.lora_A.weight": torch.ones(4, 2)})
    (peft / "adapter_config.json").write_text(json.dumps(adapter))
    assert "adapter of PEFT for 'org/name': peft_type 'LORA', r 4\n" in run(capsys, peft)[1]

    torch.save({"model": dict(model)}, tmp_path / "model.pt")
    said = run(capsys, tmp_path / "model.pt")[1]
    assert "\n  tensor names: of Meta, as in torchtune" in said
    assert "  configuration:" not in said
