"""The code blocks of the README and of each how-to page run from top to bottom."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import holdfast
from pages import GUIDE, INTERPRETER, STEPS, blocks, environment, follow, furnish, run_line
from runs import ROOT, kill_all, wait_for_step
from s3_server import s3_server

AFTER_A_RUN = {"keeping", "practices", "resuming", "single-file", "structure", "torchtune"}
"""Pages that start with the checkpoints of `./run_train.sh`, which ends at step 100."""


OWN_LENGTH = {"torchtitan"}
"""Pages whose TOML file does not set the length of the run: it is the reader's own."""

NEEDS = {"composer": "composer", "deepspeed": "deepspeed", "ray-train": "ray"}
"""Packages that the programs of a page need, and the tests can do without."""


# Stock torch warns about its own code, which no page can change.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(GUIDE.keys() - {"first-hour"}))
def test_a_page_of_the_guide_can_be_followed(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: run every block in order. A page in `AFTER_A_RUN` starts with the checkpoints of a
    run."""
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    furnish(tmp_path, page=GUIDE[name].read_text())
    if name in AFTER_A_RUN:
        shutil.copytree(request.getfixturevalue("trained"), tmp_path / "outputs")
    if name == "object-stores":
        server = s3_server()
        server.new_bucket("my-bucket")
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
    if name == "megatron-bridge":
        # In place of a save of Bridge, which needs a GPU.
        with holdfast.sealed(tmp_path / "outputs/bridge/step-500") as folder:
            (folder / "latest_checkpointed_iteration.txt").write_text("500")
    if name == "torchtitan":
        steps = request.getfixturevalue("trained") / "checkpoint"
        as_torchtitan_saves(steps / "step-100", tmp_path / "outputs/checkpoint/step-100")
    said = dict(follow(tmp_path, GUIDE[name].read_text()))
    if name in ("practices", "resuming", "torchtitan"):
        assert "resumed from step 100" in "".join(said.values())
    if name == "script":
        assert run_line(tmp_path, "python train.py").endswith("done\n"), "nothing left to do"


@pytest.mark.parametrize("name", sorted(GUIDE.keys() - OWN_LENGTH))
def test_a_run_of_a_page_is_short_without_hidden_options(name: str) -> None:
    """Method: `furnish` adds `--training.steps` and shortens the sequences. Check that each run of
    a page with a TOML file of its own sets both, in the file or in the command, and that the number
    of steps is the one that `furnish` sets."""
    page = GUIDE[name].read_text()
    files = dict(re.findall(r"^```toml\n# (\w+\.toml)\n(.*?)^```", page, re.M | re.S))
    for line in re.findall(r"^CONFIG_FILE=.*run_train.*$", page, re.M):
        training = tomllib.loads(files[line.split()[0].partition("=")[2]]).get("training", {})
        assert "--training.steps " in line or training.get("steps") == STEPS, line
        assert training.get("seq_len", 2048) <= 256, f"takes minutes on a CPU: {line}"


def as_torchtitan_saves(step: Path, folder: Path) -> None:
    """Save the state of a checkpoint by stock DCP, with the entries that TorchTitan saves: no
    random numbers, counters as tensors, and the data loader's state per data rank."""
    folder.mkdir(parents=True)
    dcp_to_torch_save(step, folder / "all.pt")
    state = torch.load(folder / "all.pt", weights_only=True)
    (folder / "all.pt").unlink()
    state.pop("rng")
    state["train_state"] = {key: torch.tensor(n) for key, n in state["train_state"].items()}
    state["dataloader"] = {"dp_rank_0": b"a place", "world_size": 1}
    stock_save(state, checkpoint_id=folder)


def test_the_readme_can_be_followed(tmp_path: Path) -> None:
    """Method: kill the first run, whose interpreter starts afresh, after step 15. Then run every
    command as written, except on one worker instead of two and two instead of four, and with steps
    30, 42 and 52 in place of 100, 120 and 130."""
    furnish(tmp_path, steps=30)
    text = (ROOT / "README.md").read_text()
    first = subprocess.Popen(
        ["./run_train.sh"],
        cwd=tmp_path,
        env={**environment(tmp_path), INTERPRETER: sys.executable},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "outputs", 15)
    kill_all(first)
    shell = "".join(f"```sh\n{block}```\n" for language, block in blocks(text) if language == "sh")
    for ours, written in (("42", "120"), ("52", "130"), ("40", "110")):
        assert written in shell
        shell = shell.replace(written, ours)
    # The next command resumes the killed run.
    said = follow(tmp_path, shell.replace("./run_train.sh    #", "true #", 1))
    runs = [heard for line, heard in said if "run_train.sh" in line]
    assert "resumed from step 10" in runs[0]
    assert "resumed from step 30" in runs[1]
    assert "passed over step 42" in runs[2]
    assert "resumed from step 40" in runs[2]
    assert "--checkpoint.keep_latest_k" in runs[3]


def test_each_row_of_the_comparison_links_to_a_guarantee_or_a_page() -> None:
    """Method: look at the last column of every row. `test_links_lead_somewhere` checks the targets
    of the links."""
    table = (ROOT / "README.md").read_text().split("## Comparison")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        assert re.search(r"\[(G\d+|page)\]\(docs/[^)]+\) \|$", row), row


def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    """Method: build a copy of the site in strict mode. Pages load nothing from other sites, and the
    navigation has every document."""
    for name in ("docs", "src/holdfast", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    ran = subprocess.run(
        ["zensical", "build", "--strict"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    for page in pages:
        fetched = re.findall(r'(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not [url for url in fetched if re.search(r"\.(?:js|css|woff2?|png|svg)$", url)]
    listed = set(re.findall(r": ([\w/-]+\.md)$", (tmp_path / "mkdocs.yml").read_text(), re.M))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    shown = (ROOT / "docs/benchmarks.md").read_text()
    for result in (ROOT / "benchmarks/results").glob("*.md"):
        assert result.name in shown
