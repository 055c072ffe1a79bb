"""Start of a run: the number of workers, and which process reports an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.trainer import launch
from holdfast.trainer.arguments import prepare_start, read_config
from warm import python

ONE_GPU = (
    "import sys, torch\n"
    "from holdfast import accelerator\n"
    "accelerator.num_devices = lambda: 1\n"
    "accelerator.use_device = lambda index: torch.device('cuda', index)\n"
)
"""Script that makes torch report one GPU; it fails once it uses the GPU."""

LAUNCH = "from holdfast.trainer.launch import main\nsys.exit(main(sys.argv[1:]))"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process; stderr goes to stdout, as in a terminal."""
    return subprocess.run(
        [python(), "-c", script, *arguments],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )


def test_an_error_before_the_process_group_exists_is_printed_once(tmp_path: Path) -> None:
    """Method: start two workers with one GPU. The second fails before it connects to the first."""
    ended = run(ONE_GPU + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode != 0
    first, second, *_ = ended.stdout.splitlines()
    assert first == "error: worker 1 of this machine has no GPU: there are 1"
    assert second.startswith("hint: NGPU=1 starts one worker per GPU")
    assert ended.stdout.count("error: ") == 1


def test_an_error_before_the_process_group_exists_is_printed_under_torchrun(
    tmp_path: Path,
) -> None:
    """Method: start two processes with torchrun's environment. The second finds no GPU."""
    script = ONE_GPU + "from holdfast.trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    serve_store = (
        "import sys, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [python(), "-c", serve_store],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
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
                [python(), "-c", script, "--job.dump_folder", str(tmp_path)],
                env={**shared, "RANK": rank, "LOCAL_RANK": rank},
                text=True,
                stderr=subprocess.PIPE,
            )
            for rank in ("0", "1")
        ]
        stderr = workers[1].communicate(timeout=120)[1]
        workers[0].kill()
        workers[0].communicate()
        agent.communicate("")
    assert workers[1].returncode == 2
    assert stderr.startswith("error: worker 1 of this machine has no GPU: there are 1\n")


def test_the_launcher_reports_a_worker_that_exits_without_a_message(tmp_path: Path) -> None:
    """Method: a worker calls `os._exit` while it chooses its device."""
    exits = (
        "import os, sys\n"
        "from holdfast import accelerator\n"
        "def exits():\n    if os.environ['RANK'] == '1':\n        os._exit(3)\n    return 0\n"
        "accelerator.num_devices = exits\n"
    )
    ended = run(exits + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode == 3
    assert ended.stdout == "error: rank 1 of 2 ended with status 3 without a message\n"


def test_a_worker_reports_an_unexpected_error_with_its_traceback(tmp_path: Path) -> None:
    """Method: a worker raises an error that is not an `Exception` while it chooses its device."""
    raises = (
        "import os, sys\n"
        "from holdfast import accelerator\n"
        "def raises():\n    if os.environ['RANK'] == '1':\n        raise GeneratorExit('odd')\n"
        "    return 0\n"
        "accelerator.num_devices = raises\n"
    )
    ended = run(raises + LAUNCH, "--job.dump_folder", str(tmp_path), NGPU="2")
    assert ended.returncode == 1
    assert ended.stdout.startswith("rank 1 failed:\n")
    assert "GeneratorExit: odd" in ended.stdout


def test_a_folder_that_cannot_be_created_is_reported_without_a_traceback(tmp_path: Path) -> None:
    """Method: set a dump folder below a file. `--job.debug` adds the traceback."""
    (tmp_path / "file").write_text("no folder")
    arguments = ("--job.dump_folder", str(tmp_path / "file/below"))
    ended = run("import sys\n" + LAUNCH, *arguments, NGPU="2")
    assert ended.returncode == 9
    assert ended.stdout.startswith("error: the run cannot continue: [Errno 20] Not a directory: ")
    assert ended.stdout.count("error: ") == 1
    assert "Traceback" not in ended.stdout
    assert "Traceback" in run("import sys\n" + LAUNCH, *arguments, "--job.debug", NGPU="2").stdout


@pytest.mark.parametrize(("local_rank", "prints"), [("0", True), ("1", False)])
def test_a_wrong_setting_is_reported_once_on_each_machine(local_rank: str, prints: bool) -> None:
    """Method: start workers 8 and 9 of a run, the first two of its second machine."""
    script = "import sys\nfrom holdfast.trainer.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    ranks = {"RANK": f"{8 + int(local_rank)}", "LOCAL_RANK": local_rank, "WORLD_SIZE": "16"}
    ended = run(script, "--training.step", "2", **ranks)
    assert ended.returncode == 2
    assert ended.stdout.startswith("error: `--training.step`") == prints
    assert bool(ended.stdout) == prints


GPUS = (
    "import os, sys\n"
    "from holdfast import accelerator\n"
    "accelerator.num_devices = lambda: int(sys.argv[1])\n"
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
def test_the_default_number_of_workers_is_that_of_the_gpus_that_the_settings_can_use(
    gpus: str, arguments: tuple[str, ...], workers: int
) -> None:
    """Method: torch reports `gpus`. A line is printed if some of them are not used."""
    ended = run(GPUS, gpus, *arguments, NGPU="")
    lines = ended.stdout.splitlines()
    assert lines[-1] == str(workers), ended.stdout
    fewer = 0 < workers < int(gpus)
    assert len(lines) == (2 if fewer else 1)
    assert lines[0].startswith(f"using {workers} of {gpus} GPUs: ") == fewer


def test_ngpu_sets_the_number_of_workers() -> None:
    """Method: set `NGPU` to a valid number, and to three values that are refused."""
    for text, status in (("3", 0), ("0", 1), ("many", 1), ("-1", 1)):
        ended = run(GPUS, "1", NGPU=text)
        assert ended.returncode == status
        assert ("NGPU" in ended.stdout) == bool(status)


def test_without_a_gpu_driver_the_gpus_are_counted_without_torch() -> None:
    """Method: count in a process in which no device file exists."""
    script = (
        "import sys\nfrom holdfast.trainer import launch\nlaunch.GPU_DEVICES = ('/nowhere',)\n"
        "assert launch.count_gpus() == 0\nassert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
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
def test_keys_of_checkpoint_without_effect_are_listed_if_enable_was_forgotten(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: pass keys on the command line, with and without `enable`."""
    prepare_start(read_config(arguments), arguments)
    printed = capsys.readouterr().err
    expected = f"settings without effect: checkpoint.{named}\nhint: --checkpoint.enable"
    assert expected in printed or not named
    assert bool(named) == ("checkpoint.enable` is off" in printed)


def test_keys_of_checkpoint_in_a_file_are_listed_if_enable_was_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: write a section without `enable` to a file, then one with `enable = false`."""
    file = tmp_path / "run.toml"
    for text, listed in (("interval = 5", True), ("interval = 5\nenable = false", False)):
        file.write_text(f"[checkpoint]\n{text}\n")
        arguments = ["--job.config_file", str(file)]
        prepare_start(read_config(arguments), arguments)
        assert ("checkpoint.interval" in capsys.readouterr().err) == listed
