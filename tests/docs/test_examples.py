"""The scripts in `examples/` run as their README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from warm import python

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(folder: Path, script: str, *arguments: str, ranks: int = 0) -> str:
    """Run an example in a folder. Returns its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [python(), *(launcher if ranks else []), str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_table_of_examples_has_every_script() -> None:
    """Method: compare the links of the table with the files in the folder."""
    table = (EXAMPLES / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+\.py)\)", table))
    assert linked == {path.name for path in EXAMPLES.glob("*.py")}


def test_a_plain_loop_resumes_to_the_same_weights_and_is_read_lazily(tmp_path: Path) -> None:
    """G9. Method: run the script, delete its last two checkpoints, and run it again. The resumed
    run ends with equal weights."""
    first = run(tmp_path, "plain_loop.py").splitlines()
    for step in (50, 60):
        shutil.rmtree(tmp_path / f"outputs/plain/step-{step}")
    second = run(tmp_path, "plain_loop.py").splitlines()
    assert first[0] == "starting at step 0"
    assert second == ["starting at step 40", first[1]]
    read = run(tmp_path, "read_lazily.py", "outputs/plain/step-60")
    assert "first two rows (2, 8)" in read
    assert "optimizer.state" in read


def test_a_sharded_run_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    """G9. Method: run the script on two ranks, then resume it on one."""
    assert "starting at step 0 on 2 ranks" in run(tmp_path, "fsdp2.py", ranks=2)
    assert "starting at step 20 on 1 ranks" in run(tmp_path, "fsdp2.py", "25", ranks=1)


def test_an_exported_model_gives_the_same_logits(tmp_path: Path) -> None:
    """G10. Method: open the exported folder by transformers, and compare the logits."""
    assert "the same logits" in run(tmp_path, "export_hf.py")
