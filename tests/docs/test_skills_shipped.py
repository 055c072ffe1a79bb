"""The shipped skills: their form, and every command and code block in them runs."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from checkpoints import others, save_step, save_stock
from hf_folders import hf_tensors, save_folder
from holdfast.cli.main import COMMANDS
from holdfast.convert.convert import convert
from holdfast.convert.plan import ConvertOptions, plan
from holdfast.hf.flavors import MODELS, config_of
from holdfast.skills.bundle import ENTRY, frontmatter, shipped
from holdfast.trainer.arguments import read_config
from holdfast.trainer.config import Config
from neighbours import prepare, prepare_page, ran_unless_torch_aborts
from pages import on_few_workers
from warm import python

FIELDS = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
NAME_LENGTH_MAX, DESCRIPTION_LENGTH_MAX, BODY_LINES_MAX = 64, 1024, 500
"""Limits of the Agent Skills format."""

PAGES = [(name, page) for name, skill in shipped().items() for page in skill.files]
RESUMED = {
    "accelerate": (
        "accelerate launch --num_processes 2 train.py",
        "outputs/run/checkpoints",
        ("checkpoint_3", "checkpoint_2"),
    ),
    "peft": ("python finetune.py", "outputs/adapter", ("step-10",)),
    "pytorch-fsdp": (
        "torchrun --standalone --nproc_per_node 2 train_dcp.py",
        "outputs/dcp",
        ("step_10",),
    ),
    "pytorch-lightning": ("python train.py", "outputs/run", ("step=48.ckpt", "last.ckpt")),
    "trl-fine-tuning": ("python finetune.py", "outputs/run", ("checkpoint-8", "checkpoint-6")),
}
"""Command that trains, folder of its checkpoints, and its last checkpoints, by skill.

The test takes the first of these away and damages the others. The command must make the first again
with the same bits.
"""

SHORT = (
    "--training.seq_len",
    "16",
    "--training.global_batch_size",
    "4",
    "--training.dataset_path",
    "train.txt",
)


def text_of(name: str, page: str) -> str:
    return shipped()[name].files[page].decode()


def blocks(name: str, page: str) -> list[tuple[str, str]]:
    """Return language and text of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(name, page), re.M | re.S)


@pytest.mark.parametrize("name", shipped())
def test_a_skill_has_the_form_that_agents_expect(name: str) -> None:
    """Method: parse the fields by PyYAML and by our own reader; check lengths, links and the depth
    of folders."""
    skill = shipped()[name]
    text = text_of(name, ENTRY)
    fields = frontmatter(text)
    assert yaml.safe_load(text.split("---\n")[1]) == fields
    assert {"name", "description"} <= fields.keys() <= FIELDS
    assert fields["name"] == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= NAME_LENGTH_MAX
    assert 0 < len(fields["description"]) <= DESCRIPTION_LENGTH_MAX
    assert len(text.split("---\n", 2)[2].splitlines()) <= BODY_LINES_MAX
    links = {
        link for page in skill.files for link in re.findall(r"\]\(([^)]+)\)", text_of(name, page))
    }
    linked = set(re.findall(r"\]\(([^)]+)\)", text))
    assert linked >= skill.files.keys() - {ENTRY}, "a page without a link to it"
    assert all(link in skill.files or link.startswith("https://") for link in links)
    assert all(file.count("/") <= 1 for file in skill.files)


@pytest.mark.parametrize(("name", "page"), PAGES)
def test_settings_and_commands_in_a_skill_exist(name: str, page: str, tmp_path: Path) -> None:
    """Method: read each TOML block as a run does. Every command and key in the text exists."""
    keys = {
        f"{section}.{field.name}"
        for section, kind in get_type_hints(Config).items()
        for field in dataclasses.fields(kind)
    }
    for language, text in blocks(name, page):
        assert language in ("sh", "toml", "python"), "no test checks blocks of this language"
        if language == "toml":
            (tmp_path / "given.toml").write_text(text)
            read_config(["--job.config_file", str(tmp_path / "given.toml")])
            assert tomllib.loads(text)["checkpoint"]["enable"], "a block without effect"
    text = text_of(name, page)
    for command in re.findall(r"`holdfast (\w+)", text):
        assert command in COMMANDS
    for key in re.findall(r"--(\w+\.\w+)", text):
        assert key in keys


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train nine steps. Returns the folder with the outputs."""
    folder = tmp_path_factory.mktemp("trained")
    follow(folder, "NGPU=2 holdfast train --checkpoint.interval 4", steps=9)
    return folder


def follow(folder: Path, command: str, *, steps: int, frameworks: bool = False) -> str:
    """Run a line of shell as an agent would, with shorter training. Returns its output.

    `frameworks`: programs find Accelerate, transformers and others imported.
    """
    bin_folder = folder / ".bin"
    if not bin_folder.exists():
        bin_folder.mkdir()
        shutil.copy(Path(__file__).parents[2] / "LICENSE", folder / "train.txt")
        short = " ".join((*SHORT, "--training.steps", str(steps)))
        for program, script in (
            ("holdfast", f'[ "$1" = train ] && set -- "$@" {short}\nset -- -m holdfast.cli "$@"'),
            ("torchrun", 'set -- -m torch.distributed.run "$@"'),
            ("accelerate", 'set -- -m accelerate.commands.accelerate_cli "$@"'),
            ("python", ""),
        ):
            text = f'#!/bin/sh\n{script}\nexec "{python(frameworks=frameworks)}" "$@"\n'
            (bin_folder / program).write_text(text)
            (bin_folder / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    environment |= {"HOME": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = ran_unless_torch_aborts(command, shell=True, cwd=folder, env=environment)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.mark.parametrize(("name", "page"), PAGES)
def test_what_a_page_tells_to_run_runs(
    name: str, page: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Method: run every line of shell and every Python block of the page in order, in a folder with
    the checkpoints that the page expects: two small ones, or those of a real run."""
    if name in RESUMED:
        prepare(name, tmp_path)
    elif page == "references/resume.md":
        shutil.copytree(request.getfixturevalue("trained") / "outputs", tmp_path / "outputs")
    elif page != "references/seed.md":
        for step in (10, 20):
            save_step(tmp_path / "outputs/checkpoint", step)
    if page in ("references/hugging-face.md", "references/serving.md"):
        shutil.rmtree(tmp_path / "outputs")
        config = config_of("llama3", MODELS["llama3"]["debugmodel"], 300)
        source = save_folder(tmp_path / "path/to/hf", config, hf_tensors(config))
        if page == "references/serving.md":
            convert(
                plan(str(source), ConvertOptions("dcp")), f"{tmp_path}/outputs/checkpoint/step-0"
            )
    if page == "references/others.md":
        others(tmp_path)
    prepare_page(page, tmp_path)
    if name == "torchtitan":
        shutil.rmtree(tmp_path / "outputs/checkpoint/step-10")
        save_stock(tmp_path / "outputs/checkpoint/step-10")
    for language, text in blocks(name, page):
        lines = text.splitlines()
        if language == "python" and lines[0].startswith("# "):
            (tmp_path / lines[0].removeprefix("# ")).write_text(text)
        elif "hosts.torchtitan" in text and find_spec("torchtitan") is None:
            continue  # No package index has its dependencies for every Python.
        elif language == "python":
            if "CheckpointManager(" in text:
                shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
            command = [python(frameworks=name in RESUMED), "-c", text]
            subprocess.run(command, cwd=tmp_path, check=True)
        elif language == "sh":
            for line in lines:
                if "holdfast train" in line and page != "references/resume.md":
                    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
                line = on_few_workers(line)
                said = follow(tmp_path, line, steps=12, frameworks=name in RESUMED)
                if "holdfast train" in line and page == "references/resume.md":
                    assert "resumed from step" in said
                    shutil.rmtree(tmp_path / "outputs")
                    source = request.getfixturevalue("trained") / "outputs"
                    shutil.copytree(source, tmp_path / "outputs")
    if name in RESUMED:
        check_that_it_goes_on(tmp_path, *RESUMED[name])


def check_that_it_goes_on(folder: Path, command: str, root: str, last: tuple[str, ...]) -> None:
    """G9. Method: take the last checkpoint away, flip a bit of others, and run the command again.
    The new checkpoint has the same bits, and the run saved no earlier one again."""
    pattern = re.sub(r"\d+", "*", last[0])
    found = {path: path.stat().st_mtime_ns for path in (folder / root).glob(pattern)}
    again = folder / root / last[0]
    before = folder / f"before-{last[0]}"
    shutil.move(again, before)
    for name in last[1:]:
        flip_bit(folder / root / name)
    follow(folder, command, steps=0)
    follow(folder, f"holdfast diff {before} {again}", steps=0)
    now = {path: path.stat().st_mtime_ns for path in (folder / root).glob(pattern)}
    assert now.keys() == found.keys()
    earlier = {path for path in found if path.name not in last}
    assert earlier, "nothing to resume from"
    assert all(now[path] == found[path] for path in earlier)


def flip_bit(path: Path) -> None:
    """Flip a bit in the middle of a file, or of the largest file in a folder."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
