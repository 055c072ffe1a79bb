"""The first command on a fresh machine: how many workers there are, and who says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.trainer import launch
from holdfast.trainer.arguments import prepare_start, read_config

ONE_GPU = (
    "import sys, torch\n"
    "torch.cuda.is_available = lambda: True\n"
    "torch.cuda.device_count = lambda: 1\n"
    "torch.cuda.set_device = lambda device: None\n"
)
"""torch as on a machine with one GPU; what comes after the device is chosen fails here."""

LAUNCH = "from holdfast.trainer.launch import main\nsys.exit(main(sys.argv[1:]))"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of its own, in a process group of its own, both outputs as a terminal has them."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )


def test_an_error_of_a_worker_before_there_is_a_group_is_printed(tmp_path: Path) -> None:
    """Method: two workers, one GPU. The second has none, long before the first could hear of it."""
    ended = run(ONE_GPU + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode != 0
    first, second, *_ = ended.stdout.splitlines()
    assert first == "error: worker 1 of this machine has no GPU: there are 1"
    assert second.startswith("hint: NGPU=1 starts as many workers as there are GPUs")
    assert ended.stdout.count("error: ") == 1


def test_so_it_is_where_torchrun_has_started_the_workers(tmp_path: Path) -> None:
    """Method: two processes with torchrun's environment; the second finds no GPU."""
    script = ONE_GPU + "from holdfast.trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    holder = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        shared = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": agent.stdout.readline().strip(),
            "WORLD_SIZE": "2",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", script, "--job.dump_folder", str(tmp_path)],
                env={**shared, "RANK": rank, "LOCAL_RANK": rank},
                text=True,
                stderr=subprocess.PIPE,
            )
            for rank in ("0", "1")
        ]
        said = workers[1].communicate(timeout=120)[1]
        workers[0].kill()
        workers[0].communicate()
        agent.communicate("")
    assert workers[1].returncode == 2
    assert said.startswith("error: worker 1 of this machine has no GPU: there are 1\n")


def test_a_worker_that_says_nothing_is_spoken_for(tmp_path: Path) -> None:
    """Method: one that leaves by `os._exit` while it looks for its device."""
    gone = (
        "import os, sys, torch\n"
        "def gone():\n    if os.environ['RANK'] == '1':\n        os._exit(3)\n    return False\n"
        "torch.cuda.is_available = gone\n"
    )
    ended = run(gone + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode == 3
    assert ended.stdout == "error: rank 1 of 2 ended with status 3, and did not say why\n"


def test_a_worker_that_fails_in_any_other_way_says_so(tmp_path: Path) -> None:
    """Method: an error that is no Exception, before anything could catch it."""
    odd = (
        "import os, sys, torch\n"
        "def odd():\n    if os.environ['RANK'] == '1':\n        raise GeneratorExit('odd')\n"
        "    return False\n"
        "torch.cuda.is_available = odd\n"
    )
    ended = run(odd + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode == 1
    assert ended.stdout.startswith("rank 1 failed:\n")
    assert "GeneratorExit: odd" in ended.stdout


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    """Method: a place for all that a run writes where nobody can make a folder; its traceback where
    that is asked for."""
    (tmp_path / "file").write_text("no folder")
    arguments = ("--job.dump_folder", str(tmp_path / "file/below"))
    ended = run("import sys\n" + LAUNCH, *arguments, NGPU="2")
    assert ended.returncode == 9
    assert ended.stdout.startswith("error: the run cannot go on: [Errno 20] Not a directory: ")
    assert ended.stdout.count("error: ") == 1
    assert "Traceback" not in ended.stdout
    assert "Traceback" in run("import sys\n" + LAUNCH, *arguments, "--job.debug", NGPU="2").stdout


@pytest.mark.parametrize(("local_rank", "speaks"), [("0", True), ("1", False)])
def test_a_wrong_setting_is_said_once_on_each_machine(local_rank: str, speaks: bool) -> None:
    """Method: workers 8 and 9 of a run, the first two of the second machine."""
    script = "import sys\nfrom holdfast.trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    ranks = {"RANK": f"{8 + int(local_rank)}", "LOCAL_RANK": local_rank, "WORLD_SIZE": "16"}
    ended = run(script, "--training.step", "2", **ranks)
    assert ended.returncode == 2
    assert ended.stdout.startswith("error: `--training.step`") == speaks
    assert bool(ended.stdout) == speaks


GPUS = (
    "import os, sys, torch\n"
    "torch.cuda.device_count = lambda: int(sys.argv[1])\n"
    "from holdfast.trainer import launch\nfrom holdfast.trainer.arguments import read_config\n"
    "launch.GPU_DEVICES = ('/dev/null',)\n"
    "config = read_config(sys.argv[2:])\n"
    "print(launch._num_workers(config))"
)


@pytest.mark.parametrize(
    ("gpus", "arguments", "workers"),
    [
        ("1", (), 1),
        ("4", (), 4),
        ("0", (), 2),
        ("6", ("--training.global_batch_size", "8", "--training.local_batch_size", "1"), 4),
        ("3", ("--parallelism.tensor_parallel_degree", "2"), 2),
    ],
)
def test_there_are_as_many_workers_as_gpus_or_as_the_settings_allow(
    gpus: str, arguments: tuple[str, ...], workers: int
) -> None:
    """Method: torch says how many there are. What is left out is said."""
    ended = run(GPUS, gpus, *arguments, NGPU="")
    lines = ended.stdout.splitlines()
    assert lines[-1] == str(workers), ended.stdout
    fewer = 0 < workers < int(gpus)
    assert [line for line in lines[:-1] if line.startswith(f"{workers} of {gpus} GPUs")] == (
        lines[:-1] if fewer else []
    )
    assert (len(lines) == 2) == fewer


def test_the_environment_says_how_many_where_somebody_wants_that() -> None:
    for text, status in (("3", 0), ("0", 1), ("many", 1), ("-1", 1)):
        ended = run(GPUS, "1", NGPU=text)
        assert ended.returncode == status
        assert ("NGPU" in ended.stdout) == bool(status)


def test_without_a_gpu_nobody_waits_for_torch() -> None:
    script = (
        "import sys\nfrom holdfast.trainer import launch\nlaunch.GPU_DEVICES = ('/nowhere',)\n"
        "assert launch.count_gpus() == 0\nassert 'torch' not in sys.modules"
    )
    assert run(script).returncode == 0
    assert launch.NUM_CPU_WORKERS == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ("--checkpoint.interval", "5", "--checkpoint.load_only"),
            "interval, checkpoint.load_only",
        ),
        (("--checkpoint.enable", "--checkpoint.interval", "5"), ""),
        (("--checkpoint.no-enable", "--checkpoint.interval", "5"), ""),
        ((), ""),
    ],
)
def test_keys_of_checkpoints_are_pointed_out_where_enable_was_forgotten(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_start(read_config(arguments), arguments)
    said = capsys.readouterr().err
    assert f"without effect are checkpoint.{named}\nhint: --checkpoint.enable" in said or not named
    assert bool(named) == ("checkpoint.enable` is off" in said)


def test_so_they_are_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Method: a section without the key, then with it turned off."""
    file = tmp_path / "run.toml"
    for text, said in (("interval = 5", True), ("interval = 5\nenable = false", False)):
        file.write_text(f"[checkpoint]\n{text}\n")
        arguments = ["--job.config_file", str(file)]
        prepare_start(read_config(arguments), arguments)
        assert ("checkpoint.interval" in capsys.readouterr().err) == said
