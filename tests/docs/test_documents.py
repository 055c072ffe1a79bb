"""The documents: their code runs, their links work, and the tests they name exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import holdfast
from checkpoints import others, save_step
from hf_folders import PEFT, hf_tensors, low_rank, save_adapter, save_folder
from holdfast.hf.flavors import MODELS, config_of
from holdfast.trainer.arguments import read_config
from pages import GUIDE, furnish, run_line
from runs import ROOT
from warm import python

EXAMPLES = ROOT / "examples" / "README.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/*.md"), EXAMPLES]
)
FOLLOWED = {ROOT / "README.md", *GUIDE.values()}
"""Pages that `test_guide` follows from top to bottom."""


def blocks(language: str, *, but: Collection[Path] = ()) -> list[tuple[str, str]]:
    """Return every code block of a language, as (`document#number`, text)."""
    found = []
    for document in (d for d in DOCUMENTS if d not in but):
        texts = re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)
        found += [(f"{document.relative_to(ROOT)}#{i}", text) for i, text in enumerate(texts)]
    return found


def commands() -> list[str]:
    """Return every line of every shell block, without comments."""
    lines = [line for _, text in blocks("sh", but=FOLLOWED) for line in text.splitlines()]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines))


@pytest.mark.parametrize(("name", "text"), blocks("python", but=FOLLOWED - {ROOT / "README.md"}))
def test_python_blocks_run(name: str, text: str, tmp_path: Path) -> None:
    """Method: run each block as a script in an empty folder. A block with a manager runs twice, so
    that the second run resumes."""
    for _ in range(1 + ("CheckpointManager" in text)):
        subprocess.run([python(), "-W", "error", "-c", text], cwd=tmp_path, check=True)


@pytest.mark.parametrize(("name", "text"), blocks("toml"))
def test_toml_blocks_are_configurations(name: str, text: str, tmp_path: Path) -> None:
    """Method: read each block as a run does, and compare every value with the configuration."""
    (tmp_path / "given.toml").write_text(text)
    config = read_config(["--job.config_file", str(tmp_path / "given.toml")])
    for section, keys in tomllib.loads(text).items():
        for key, value in keys.items():
            found = getattr(getattr(config, section), key)
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_every_command_is_one_that_is_run_here() -> None:
    """Method: compare the commands of all pages with the lists in this file.

    `./run_tests.sh` is left out, since it runs this test; the release script has a test in
    `test_project_files`.
    """
    left_out = ("./run_tests.sh", "scripts/release.sh")
    ours = {command for command in commands() if not command.startswith(left_out)}
    run_here = (*TRAINING, *LOOKING, *SERVING, *GUIDES, *CONVERTING, *OTHERS)
    assert ours == {shlex.join(shlex.split(command)) for command in run_here}


TRAINING = (
    "./run_train.sh --checkpoint.no-enable "
    "--checkpoint.exclude_from_loading dataloader,lr_scheduler",
)


LOOKING = (
    "holdfast list outputs/checkpoint",
    "holdfast list outputs/checkpoint --verify",
    "holdfast show outputs/checkpoint/step-100",
    "holdfast show outputs/checkpoint/step-100 layers.0",
    "holdfast show outputs/checkpoint/step-100 layers.0.attention.wq.weight",
    "holdfast show outputs/checkpoint/step-100 layers.0.attention.wq.weight --stats --values",
    "holdfast show outputs/checkpoint/step-100 train_state.step",
    "holdfast show outputs/checkpoint/step-100 train_state",
    "holdfast diff outputs/checkpoint/step-90 outputs/checkpoint/step-100",
    "holdfast diff outputs/checkpoint/step-90 outputs/checkpoint/step-100 --model-only --json",
    "holdfast verify outputs/checkpoint",
    "holdfast verify outputs/checkpoint/step-100 --json",
    "holdfast verify outputs/checkpoint --quick",
    "holdfast verify outputs/checkpoint --mark",
    "holdfast doctor outputs/checkpoint",
    "holdfast doctor outputs/checkpoint --verify",
    "holdfast prune outputs/checkpoint --keep-latest-k 3 --dry-run",
    "holdfast prune outputs/checkpoint --keep-latest-k 3 --keep-every-n-steps 1000",
    "holdfast prune outputs/checkpoint",
    "holdfast report outputs/checkpoint",
    "holdfast report outputs/checkpoint --out run.html",
    "holdfast completion bash",
    "holdfast completion zsh",
    "holdfast version",
)


def test_the_commands_that_look_after_checkpoints(tmp_path: Path, trained: Path) -> None:
    """Method: run each command on the checkpoints of `./run_train.sh`. `diff` finds that they
    differ, the others succeed; `list` and `doctor` name the checkpoint that a resume takes."""
    shutil.copytree(trained, tmp_path / "outputs")
    for command in LOOKING:
        words = [python(), "-m", "holdfast.cli", *shlex.split(command)[1:]]
        ran = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True)
        if command.startswith("holdfast diff"):
            assert ran.returncode == 6, command
            continue
        assert (ran.returncode, ran.stderr) == (0, ""), command
        if command in ("holdfast list outputs/checkpoint", "holdfast doctor outputs/checkpoint"):
            assert "resume" in ran.stdout
            assert "100" in ran.stdout


SERVING = (
    "holdfast serve outputs --max-age 7200",
    "nohup holdfast serve outputs other/checkpoint --max-age 7200 >serve.log 2>&1 &",
    "holdfast serve outputs --host 0.0.0.0",
)


@pytest.mark.parametrize("command", SERVING)
def test_the_commands_that_serve(tmp_path: Path, command: str) -> None:
    """Method: run each command on a free port, then end it by SIGTERM."""
    save_step(tmp_path / "outputs/checkpoint", 10)
    serve = f"{shlex.quote(sys.executable)} -m holdfast.cli serve --port 0"
    script = command.replace("holdfast serve", serve)
    if "serve.log" not in script:
        script += " >serve.log 2>&1 &"
    ran = subprocess.run(
        ["bash", "-c", f"{script} echo $!"], cwd=tmp_path, text=True, capture_output=True
    )
    log = tmp_path / "serve.log"
    for line in ("serving", "stopped by SIGTERM"):
        deadline = time.monotonic() + 30
        while not log.exists() or line not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        if line == "serving":
            os.kill(int(ran.stdout), signal.SIGTERM)


def test_the_page_on_serving_names_the_metrics_that_are_served() -> None:
    """Method: compare the names in the table and in the example rules with those in the source."""
    page = (ROOT / "docs/serve.md").read_text()
    source = (ROOT / "src/holdfast/dashboard/digest.py").read_text()
    rows = re.findall(r"^\| (`holdfast_.*)$", page, re.M)
    table = {name for row in rows for name in re.findall(r"holdfast_(\w+)", row)}
    (rule,) = re.findall(r"^```yaml\n(groups:.*?)^```", page, re.M | re.S)
    assert set(re.findall(r"holdfast_(\w+)", rule)) <= table
    assert all(one["expr"] for one in yaml.safe_load(rule)["groups"][0]["rules"])
    served = re.findall(r'(?:gauge|counter|GaugeMetricFamily), "(\w+)"', source)
    counted = re.findall(r'^        \("(\w+)", "', source, re.M)
    assert {name.removesuffix("_total") for name in table} == {*served, *counted}


GUIDES = (
    "holdfast skills sync",
    "holdfast skills sync --to claude",
    "holdfast skills sync --project",
    "holdfast skills sync --check",
    "holdfast skills update",
    "holdfast skills list",
    "holdfast skills show holdfast",
    "holdfast skills show holdfast references/resume.md",
    "holdfast skills diff holdfast",
    "holdfast skills reset holdfast",
    "holdfast skills remove torchtitan",
)


def test_the_commands_of_the_guides(tmp_path: Path) -> None:
    """Method: run the commands one after the other, in a repository below an empty home folder."""
    (tmp_path / ".git").mkdir()
    for command in GUIDES:
        words = [sys.executable, "-m", "holdfast.cli", *shlex.split(command)[1:]]
        environment = {**os.environ, "HOME": str(tmp_path)}
        ran = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert (ran.returncode, ran.stderr) == (0, ""), command


CONVERTING = (
    "holdfast convert path/to/hf outputs/seed/step-0",
    "holdfast convert outputs/seed/step-0 exported --to hf --hf-assets path/to/hf "
    "--dtype bfloat16 --max-shard-size 5GB",
    "holdfast verify exported --as-export",
    "holdfast convert outputs/seed/step-0 original --to hf --hf-assets path/to/hf",
    "holdfast diff outputs/seed/step-0 original --model-only",
    "holdfast verify exported --as-export --against original",
    "holdfast convert outputs/seed/step-0 checkpoint.pt --to torch --model-only",
    "holdfast convert checkpoint.pt outputs/again/step-0 --to dcp",
    "python ./scripts/checkpoint_conversion/convert_from_hf.py path/to/hf initial_load_path "
    "--model_name llama3 --model_flavor debugmodel",
    "python ./scripts/checkpoint_conversion/convert_to_hf.py initial_load_path exported_again "
    "--hf_assets_path path/to/hf --model_name llama3 --model_flavor debugmodel",
    "python ./scripts/convert_from_hf.py path/to/hf initial_load_path_2 "
    "--model_name llama3 --model_flavor debugmodel",
    "python ./scripts/convert_to_hf.py initial_load_path_2 exported_again_2 "
    "--hf_assets_path path/to/hf",
    "holdfast convert path/to/adapter outputs/adapter/step-0 --hf-assets path/to/hf",
    "holdfast convert outputs/adapter/step-0 exported-adapter --to hf "
    "--adapter-config path/to/adapter/adapter_config.json --hf-assets path/to/hf",
    "holdfast convert outputs/adapter/step-0 merged --to hf --merge "
    "--adapter-config path/to/adapter --hf-assets path/to/hf",
    "holdfast convert path/to/adapter merged-too --to hf --merge --hf-assets path/to/hf",
)

ADAPTED = "model.layers.0.self_attn.q_proj"
"""Layer that has an adapter."""


def test_the_commands_that_convert(tmp_path: Path) -> None:
    """Method: run the commands one after the other on a small Llama. Each round trip gives the same
    tensors."""
    config = config_of("llama3", MODELS["llama3"]["debugmodel"], 300)
    # Larger weights than a trained model has would give other logits in bfloat16.
    tensors = {name: 0.05 * tensor for name, tensor in hf_tensors(config).items()}
    save_folder(tmp_path / "path/to/hf", config, tensors, num_files=2)
    save_adapter(tmp_path / "path/to/adapter", low_rank(tensors, {ADAPTED: 4}))
    for command in CONVERTING:
        words = shlex.split(command)
        if words[0] == "holdfast":
            words[:1] = ["python", "-m", "holdfast.cli"]
        words = [str(ROOT / word) if word.startswith("./scripts") else word for word in words]
        ran = subprocess.run([python(), *words[1:]], cwd=tmp_path, text=True, capture_output=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
    for folder in ("exported_again", "exported_again_2"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    adapter = load_file(tmp_path / "exported-adapter/adapter_model.safetensors")
    a, b = (adapter[f"{PEFT}{ADAPTED}.lora_{one}.weight"] for one in "AB")
    # The adapter has rank 4 and `lora_alpha` 8.
    wanted = {**tensors, f"{ADAPTED}.weight": tensors[f"{ADAPTED}.weight"] + 2 * (b @ a)}
    for folder in ("merged", "merged-too"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.allclose(found[n], t, atol=1e-4) for n, t in wanted.items())


OTHERS = (
    "holdfast show lightning_logs",
    "holdfast verify zero",
    "holdfast convert zero outputs/from_zero/step-0",
    "holdfast convert compiled.pt outputs/from_compiled/step-0 --rename '_orig_mod='",
)


def test_the_commands_for_checkpoints_of_other_programs(tmp_path: Path) -> None:
    """Method: run the commands on a checkpoint of DeepSpeed, a file as Lightning writes it, and the
    state dict of a compiled module."""
    others(tmp_path)
    shutil.copytree(ROOT / "tests/golden/zero-2", tmp_path / "zero")
    (tmp_path / "zero/fp32.safetensors").unlink()
    for command in OTHERS:
        words = [python(), "-m", "holdfast.cli", *shlex.split(command)[1:]]
        ran = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        if "lightning" in command:
            assert "left out `hyper_parameters`: argparse.Namespace" in ran.stdout
    assert holdfast.open(tmp_path / "outputs/from_compiled/step-0").names() == ["weight"]


def test_a_run_that_saves_nothing(tmp_path: Path) -> None:
    """Method: run the command of the configuration page for two steps, on one worker."""
    furnish(tmp_path, steps=2)
    assert "step 2 " in run_line(tmp_path, TRAINING[0])
    assert not (tmp_path / "outputs/checkpoint").exists()


def test_the_page_of_the_terminal_has_every_command() -> None:
    from holdfast.cli.main import COMMANDS

    page = (ROOT / "docs/cli.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(COMMANDS)


def test_the_configuration_page_is_what_the_classes_say() -> None:
    """Method: run the script that writes the tables with `--check`, which compares the page with
    the docstrings of the fields."""
    script = [sys.executable, str(ROOT / "scripts/configuration_reference.py"), "--check"]
    ran = subprocess.run(script, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr


def test_exit_statuses_are_those_of_the_errors() -> None:
    from holdfast import errors

    page = (ROOT / "docs/configuration.md").read_text()
    documented = {int(status) for status in re.findall(r"^\| (\d+) \|", page, re.M)}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    raised = {c.exit_status for c in classes if issubclass(c, errors.HoldfastError)}
    assert documented == raised | {0, 3}


def test_guarantees_name_tests_that_exist() -> None:
    """Method: each test in the lists of the page exists, and its docstring names the guarantee.
    Docstrings of tests name only guarantees of the page."""
    text = (ROOT / "docs/guarantees.md").read_text()
    promised = re.findall(r"^### (G\d+) ", text, re.M)
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", section)
        assert named, section.splitlines()[0]
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text())
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            found = [f for f in functions if f.name == test]
            assert found, f"{file}::{test}"
            assert section.split()[0] in (ast.get_docstring(found[0]) or ""), f"{file}::{test}"
    for path in (ROOT / "tests").rglob("test_*.py"):
        for line in re.findall(r'"""((?:G\d+(?:, )?)+):', path.read_text()):
            assert set(line.split(", ")) <= set(promised), f"{path}: {line}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


def test_links_lead_somewhere() -> None:
    """Method: the target file of each link exists, and has a heading for the anchor."""
    for document in DOCUMENTS:
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.read_text())
        for target, anchor in links:
            page = document.parent / target if target else document
            assert page.exists(), f"{document}: {target}"
            if anchor and "--8<--" not in page.read_text():
                assert anchor in anchors(page), f"{document}: {target}#{anchor}"


@pytest.mark.parametrize("page", [d for d in DOCUMENTS if "decisions" not in d.parts], ids=str)
def test_documents_name_no_machine_and_no_registry(page: Path) -> None:
    """Method: search the text for paths of a machine and names of package registries."""
    found = re.findall(r"/(?:home|work|root|Users)/\w+|\bpypi-\w+|simple/", page.read_text())
    assert not found


def test_the_figures_of_the_readme_are_those_of_the_tables() -> None:
    """Method: add up the rows of the crash report, and find the rows of the benchmarks."""
    readme = (ROOT / "README.md").read_text()
    cells = [line.strip("|").split("|") for line in _text("docs/crash-report.md").splitlines()]
    counts: dict[str, list[list[int]]] = {}
    for cell in cells:
        if len(cell) == 9 and cell[3].strip().isdigit():
            counts.setdefault(cell[1].strip(), []).append([int(number) for number in cell[3:]])
    ours = counts["Holdfast"] + counts["Holdfast, async"]
    stock = counts["torch DCP"]
    assert all(sum(row[3:]) == 0 for row in ours)
    assert f"in all {sum(row[0] for row in ours):,} states" in readme
    failed = sum(sum(row[3:]) for row in stock)
    assert f"{failed} of {sum(row[0] for row in stock)} end in" in readme
    results = _text("benchmarks/results/README.md")
    for row, figure in (
        ("save, 1 process: faster than `dcp.save` |", r"a save is ([\d.]+) times"),
        ("load, warm, 1 process: faster than `dcp.load` |", r"the page cache ([\d.]+) times"),
        ("save while training: blocked in `save()` |", r"blocked for ([\d.]+) ms"),
    ):
        found = re.search(figure, readme)
        measured = results.split(f"| {row}")[1].split("|")[1]
        assert found, row
        assert measured.split()[0] == found[1], row


def _text(path: str) -> str:
    return (ROOT / path).read_text()
