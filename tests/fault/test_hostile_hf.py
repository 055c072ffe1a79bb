"""Hugging Face folders from elsewhere: absurd configurations, links out of the folder, missing
shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from extent import every
from hf_folders import LLAMA, hf_tensors, save_folder
from holdfast.catalog.hf_folder import of_language_model, open_hf_folder
from holdfast.catalog.verify import VerifyTarget, verify
from holdfast.cli.main import main
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.convert.sizes import check_alike
from holdfast.errors import DamagedError, FormatError, MismatchError
from holdfast.format.safetensors import missing_shards
from holdfast.hf.assets import config_bytes
from holdfast.hf.families import FAMILIES, family_of
from holdfast.hf.family import mapping_of
from holdfast.storage.local import LocalStore
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.quantized import Dequantized

ALL: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": False,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 40,
    "moe_layers": [1],
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
"""Every key that any family reads."""

ABSURD: list[Any] = [
    "32",
    "x" * 100_000,
    64.0,
    -1,
    10**10,
    10**40,
    True,
    [],
    ["0"],
    [10**30],
    [0] * 100_001,
    {"a": [1]},
]


class Empty:
    """A folder without tensors."""

    infos: dict[str, TensorInfo]

    def __init__(self) -> None:
        self.infos = {}

    def read(self, *_: object) -> Any:
        raise AssertionError


def uses(config: Any) -> Iterator[Any]:
    """Use a configuration in every way there is."""
    language = of_language_model(config)
    yield lambda: mapping_of(family_of(language, where="test"), language)
    yield lambda: check_alike((config, "one"), (LLAMA, "other"))
    yield lambda: Dequantized(Empty(), config.get("quantization_config") or {})
    yield lambda: config_bytes(config, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.model_types[0]))
def test_an_absurd_configuration_is_refused_at_once(family: Any) -> None:
    """G8. Method: each absurd value for each key that a family reads, and for each key that holds a
    table (by default a sixth of the values for keys that are no sizes); in every use, only
    `FormatError` is raised, in bounded time."""
    whole = {**ALL, "model_type": family.model_types[0]}
    mapping_of(family, whole)
    keys = [*whole, "text_config", "quantization_config", "rope_scaling", "torch_dtype"]
    started, refused = time.monotonic(), dict.fromkeys(keys, 0)
    sizes = ("num_hidden_layers", "num_attention_heads", "vocab_size", "hidden_size")
    for number, key in enumerate(keys):
        for value in ABSURD if key in sizes else every(6, ABSURD, start=number):
            for use in uses({**whole, key: value}):
                try:
                    use()
                except FormatError:
                    refused[key] += 1
                except MismatchError:
                    continue  # Two configurations that differ, as `check_alike` is to find.
    assert time.monotonic() - started < 60
    for key in sizes:
        assert refused[key] >= len(ABSURD) - 2, key


def test_a_float_is_no_size_and_a_text_neither(tmp_path: Path) -> None:
    """G8. Method: by the command; the message names the key, the expected and the found value."""
    for number, (key, value) in enumerate(
        [("num_hidden_layers", "32"), ("head_dim", 64.0), ("num_hidden_layers", 10**10)]
    ):
        folder = save_folder(tmp_path / str(number), LLAMA, hf_tensors(LLAMA))
        (folder / "config.json").write_text(json.dumps({**LLAMA, key: value}))
        started = time.monotonic()
        with pytest.raises(FormatError, match=f"`{key}` must be a whole number") as raised:
            plan(str(folder), ConvertOptions(to="dcp"))
        assert str(value) in raised.value.what
        assert time.monotonic() - started < 10
        assert main(["convert", str(folder), str(tmp_path / "out")]) == 8
    assert not (tmp_path / "out").exists()


WORST = """
import resource, sys, time
from holdfast.errors import FormatError
from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of
sys.path.insert(0, "tests")
from hf_folders import LLAMA
started = time.monotonic()
for layers in (27_000, 99_999):
    config = {**LLAMA, "num_hidden_layers": layers}
    try:
        mapping_of(family_of(config, where="test"), config)
    except FormatError:
        print("refused")
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_the_largest_configuration_that_is_not_refused_takes_bounded_memory() -> None:
    """G8, G13. Method: the most layers below the limit, in a new process."""
    ran = subprocess.run([sys.executable, "-c", WORST], capture_output=True, text=True, check=True)
    *refused, last = ran.stdout.splitlines()
    assert refused == ["refused"]
    seconds, mebibytes = map(float, last.split())
    assert seconds < 60
    assert mebibytes < 1024


def test_a_configuration_that_is_no_table_or_too_large_is_refused(tmp_path: Path) -> None:
    """G8. Method: other JSON, no JSON, a gibibyte of zeros, a pipe."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    path = folder / "config.json"
    for text in (
        "[]",
        "1",
        "null",
        "{",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a": NaN}',
        "1" * 5000,
    ):
        path.write_text(text)
        with pytest.raises(FormatError):
            plan(str(folder), ConvertOptions(to="dcp"))
    os.truncate(path, 1 << 30)
    with pytest.raises(FormatError, match="more than"):
        plan(str(folder), ConvertOptions(to="dcp"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="named pipe"):
        plan(str(folder), ConvertOptions(to="dcp"))


@pytest.mark.parametrize(
    "file", ["merges.txt", "config.json", "model.safetensors", "additional_chat_templates/x.jinja"]
)
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_link_out_of_a_strangers_folder_is_never_followed(
    file: str, to: Any, tmp_path: Path
) -> None:
    """G8. Method: a link to a secret in place of each file that a conversion reads or copies; the
    result, if any, does not contain the secret."""
    if (file, to) in (("merges.txt", "dcp"), ("additional_chat_templates/x.jinja", "dcp")):
        pytest.skip("a step takes no assets along")
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    secret = tmp_path / "id_rsa"
    if (folder / file).exists():
        shutil.copy(folder / file, secret)
        (folder / file).unlink()
    else:
        secret.write_text("secret")
        (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).symlink_to(secret)
    options = ConvertOptions(to=to)
    with pytest.raises(FormatError, match="is a link to a place outside of its folder"):
        convert(plan(str(folder), options), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    report = None
    if file == "model.safetensors":
        report = verify(VerifyTarget(LocalStore(tmp_path), "hf"))
        assert not report.good


def test_a_link_in_a_folder_around_a_checkpoint_is_never_followed(tmp_path: Path) -> None:
    """G8. Method: the file of a rank of Megatron, in a folder of its own, is a link to another
    file of the reader; every way to open the folder refuses it."""
    secret = tmp_path / "secret.pt"
    torch.save({"model": {"a": torch.zeros(3)}}, secret)
    rank = tmp_path / "iter_0000005/mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").symlink_to(secret)
    with pytest.raises(FormatError, match="is a link to a place outside of its folder"):
        plan(str(rank.parent), ConvertOptions(to="dcp"))
    with pytest.raises(FormatError, match="is a link to a place outside of its folder"):
        verify(VerifyTarget(LocalStore(tmp_path), rank.parent.name))


def test_a_folder_of_templates_that_is_a_link_is_not_copied(tmp_path: Path) -> None:
    """G8. Method: the folder itself is a link to another one."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA))
    (tmp_path / "ssh").mkdir()
    (tmp_path / "ssh" / "id_rsa").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "ssh")
    options = ConvertOptions(to="hf")
    with pytest.raises(FormatError, match="outside of its folder"):
        convert(plan(str(folder), options), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_cache_of_the_hub_is_read_as_it_is(tmp_path: Path) -> None:
    """Method: a snapshot whose files are links to blobs, exported with its assets, and verified."""
    cache = tmp_path / "models--org--name"
    folder = save_folder(cache / "snapshots" / "0123abcd", LLAMA, hf_tensors(LLAMA))
    (folder / "merges.txt").write_text("a b")
    (cache / "blobs").mkdir()
    for path in [*folder.iterdir()]:
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    options = ConvertOptions(to="hf")
    convert(plan(str(folder), options), str(tmp_path / "out"))
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"
    assert not (tmp_path / "out" / "merges.txt").is_symlink()
    assert verify(VerifyTarget(LocalStore(folder.parent), folder.name)).good


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_set_of_shards_in_part_is_not_good(missing: int, tmp_path: Path) -> None:
    """G3. Method: one of three shards missing, with the index and without; every command that opens
    the folder names it."""
    folder = save_folder(tmp_path / "hf", LLAMA, hf_tensors(LLAMA), num_files=3)
    assert verify(VerifyTarget(LocalStore(tmp_path), "hf")).good
    gone = f"model-0000{missing}-of-00003.safetensors"
    (folder / gone).unlink()
    for _ in range(2):
        report = verify(VerifyTarget(LocalStore(tmp_path), "hf"))
        assert [f.file for f in report.findings if f.what == "is missing"] == [gone]
        with pytest.raises(DamagedError, match=gone):
            open_hf_folder(LocalStore(tmp_path), "hf")
        assert main(["verify", str(folder)]) == 7
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def test_shards_are_counted_by_their_names() -> None:
    """Method: complete and incomplete sets, numbered from 0 and from 1, several in one folder;
    absurd numbers take no time."""
    assert missing_shards(["model.safetensors", "a-of-b.safetensors"]) == []
    assert missing_shards([f"m-0000{n}-of-00002.x" for n in (1, 2)]) == []
    assert missing_shards([f"m-0000{n}-of-00002.x" for n in (0, 1)]) == []
    assert missing_shards(["m-2-of-3.x", "n-00001-of-00002.x"]) == [
        "m-1-of-3.x",
        "m-3-of-3.x",
        "n-00002-of-00002.x",
    ]
    assert len(missing_shards(["m-1-of-999999999.x"])) == 50
    assert missing_shards(["m-1-of-99999999999999999999.x"]) == []
