"""`convert --push-to-hub`: a private repository with the export and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from hf_folders import hf_tensors, save_folder
from holdfast.cli.convert import run
from holdfast.convert.hub import card
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.errors import StorageError, UsageError
from hub_server import READ_ONLY, TOKEN, Hub, running_hub

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
NAME = "someone/tuned"

# huggingface_hub sends large files by an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder whose card has a license."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- old\n---\n# Old\n")
    return folder


def push(source: Path, target: Path, *more: str) -> int:
    arguments = [str(source), str(target), "--to", "hf", "--push-to-hub", NAME, *more]
    return run(arguments)


def test_an_export_is_uploaded_to_a_private_repository(
    hub: Hub, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G14. Method: a small hub on loopback; the repository has the bytes of the folder, and weights
    of an earlier upload are gone."""
    assert push(source, tmp_path / "many", "--max-shard-size", "4KB") == 0
    assert hub.private == {NAME: True}
    assert f"uploaded: {hub.url}/{NAME}/commit/1" in capsys.readouterr().out
    for target, more in (("many", ()), ("one", ("--json",))):
        if more:
            assert push(source, tmp_path / target, *more) == 0
        files = {file.name: file.read_bytes() for file in (tmp_path / target).iterdir()}
        assert hub.files[NAME] == {".gitattributes": b"", **files}
    assert '"commit"' in capsys.readouterr().out


def test_a_model_card_says_where_the_weights_come_from(source: Path, tmp_path: Path) -> None:
    """Method: a checkpoint with a step and a base on the hub; PyYAML reads the header."""
    from holdfast.convert.convert import convert

    step = tmp_path / "someone" / "run" / "checkpoint" / "step-20"
    convert(plan(str(source), ConvertOptions("dcp")), str(step))
    options = ConvertOptions("hf", hf_assets=str(source), push_to_hub=NAME)
    text = card(plan(str(step), options), "bfloat16", (source / "README.md").read_bytes())
    data = yaml.safe_load(text.split("---\n")[1])
    assert data == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "tags": ["holdfast"],
    }
    for row in ("| converted from | `run/checkpoint/step-20` |", "| step | 20 |", "bfloat16"):
        assert row in text
    assert "# tuned" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("token", "words"), [("hf_wrong", "401: no token"), (READ_ONLY, "403: its token may not")]
)
def test_a_refused_token_is_known_before_the_conversion(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    """G14. Method: tokens that the hub refuses; the error has one line, and nothing is written."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(StorageError, match=words) as refused:
        push(source, tmp_path / "out")
    assert "\n" not in refused.value.what
    assert "HF_TOKEN" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()
    assert not hub.files


def test_an_upload_that_fails_can_be_repeated(hub: Hub, source: Path, tmp_path: Path) -> None:
    """G14. Method: the hub fails after one file. The folder is complete, the repository unchanged;
    the repeated upload sends only the other files."""
    hub.fails_after = 1
    with pytest.raises(StorageError) as failed:
        push(source, tmp_path / "out", "--max-shard-size", "4KB")
    assert f"hf upload {NAME} {tmp_path / 'out'}" in str(failed.value.hint)
    assert [*hub.files[NAME]] == [".gitattributes"]
    hub.fails_after, sent = None, hub.num_sent
    assert push(source, tmp_path / "out", "--max-shard-size", "4KB", "--overwrite") == 0
    num_files = len([*(tmp_path / "out").glob("*.safetensors")])
    assert hub.num_sent == num_files
    assert 1 <= sent < num_files


def test_only_exports_are_uploaded(source: Path, tmp_path: Path) -> None:
    """Method: another format, a name without owner, and a hub that is not there."""
    with pytest.raises(UsageError, match="needs `--to hf`"):
        run([str(source), str(tmp_path / "step-1"), "--push-to-hub", NAME])
    with pytest.raises(UsageError, match="`org/name`"):
        run([str(source), str(tmp_path / "out"), "--to", "hf", "--push-to-hub", "tuned"])
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: a port that nothing listens on."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(StorageError, match="cannot be written") as failed:
        push(source, tmp_path / "out")
    assert "\n" not in failed.value.what
