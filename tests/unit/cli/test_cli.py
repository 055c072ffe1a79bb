"""The commands `list`, `verify` and `version`: output, errors and exit status."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
from checkpoints import save_safetensors, save_step, save_stock, save_torch
from holdfast.catalog.catalog import Catalog
from holdfast.cli import terminal
from holdfast.cli.main import COMMANDS, main
from holdfast.spelling import spelled_age, spelled_bytes
from holdfast.storage.local import LocalStore


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints that two ranks wrote, and one checkpoint of every other format."""
    home = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save_step(home / "outputs/checkpoint", step)
    save_stock(home / "stock")
    save_safetensors(home / "hf")
    save_torch(home / "model.pt")
    return home


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "home"))


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command; returns its exit status, stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_list_shows_each_checkpoint_and_the_one_that_a_resume_takes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: three checkpoints, the newest truncated, and the attempt of a killed save."""
    folder = home / "outputs/checkpoint"
    newest = folder / "step-3/__1_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-1])
    (folder / ".attempt-step-4-0123abcd").mkdir()
    status, said, err = run(capsys, "list", folder)
    assert (status, err) == (0, "")
    rows = [line.split() for line in said.splitlines()]
    assert rows[0] == ["step", "size", "age", "kind", "layout", "state"]
    assert rows[1][0] == "1"
    assert rows[1][-4:] == ["full", "2", "ranks", "good"]
    assert rows[2][-2:] == ["good", "resume"]
    assert "damaged" in rows[3]
    assert "attempt" in rows[4]
    assert "`__1_0.distcp`" in said.splitlines()[6]

    status, said, err = run(capsys, "list", folder, "--json")
    found: dict[str, Any] = json.loads(said)
    assert (status, err, found["resume"]) == (0, "", 2)
    states = [(one["step"], one["state"]) for one in found["checkpoints"]]
    assert states == [(1, "good"), (2, "good"), (3, "damaged"), (None, "attempt")]
    assert found["checkpoints"][0]["layout"] == {"world_size": 2}


def test_list_verify_reads_all_data_and_shows_pinned_and_hugging_face_folders(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: one checkpoint with a flipped bit, which sizes do not show; one pinned; one of
    safetensors; one that a run has marked."""
    folder = home / "outputs/checkpoint"
    flip_a_bit(folder / "step-2/__0_0.distcp")
    (folder / ".pinned-step-1").touch()
    (folder / ".damaged-step-3").write_text("a block")
    (home / "hf").rename(folder / "step-4")
    found = json.loads(run(capsys, "list", folder, "--json")[1])
    assert found["resume"] == 2
    assert [one["kind"] for one in found["checkpoints"]] == ["full", "full", None, "hf"]
    assert [one["pinned"] for one in found["checkpoints"]] == [True, False, False, False]
    status, said, err = run(capsys, "list", folder, "--verify")
    assert (status, err.splitlines()[0]) == (7, "error: 1 of 4 checkpoints are damaged")
    assert json.loads(run(capsys, "list", folder, "--verify", "--json")[1])["resume"] == 1
    rows = {line.split()[0]: line for line in said.splitlines()}
    assert rows["1"].endswith("resume")
    assert "damaged" in rows["2"]
    assert "`model.large` block" in rows["step-2:"]
    assert "found damaged before: a block" in rows["step-3:"]
    said = run(capsys, "verify", folder)[1]
    assert "note: found damaged before: a block" in said
    assert "a resume takes step 1" in said


def test_list_verify_exits_with_the_status_of_verify(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: no damage; an undamaged checkpoint marked; one damaged; one without index."""
    folder = home / "outputs/checkpoint"
    changes: list[Callable[[], object]] = [
        lambda: None,
        (folder / ".damaged-step-3").touch,
        lambda: flip_a_bit(folder / "step-2/__0_0.distcp"),
        (folder / "step-1/manifest.json").unlink,
    ]
    for change in changes:
        change()
        found = [run(capsys, command, folder, *more)[0] for command, more in EQUAL]
        assert found[0] == found[1]
    assert found == [7, 7]


EQUAL = (("verify", ()), ("list", ("--verify",)))
"""Commands whose exit status must be equal."""


@pytest.mark.parametrize("path", ["outputs/checkpoint", "stock", "hf", "model.pt"])
def test_verify_passes_undamaged_checkpoints_of_every_format(
    saved: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3. Method: one checkpoint of each format, with and without `--quick`."""
    for more in ((), ("--quick",)):
        status, said, err = run(capsys, "verify", saved / path, *more)
        assert (status, err) == (0, ""), said
        assert "good" in said or "structure is good" in said


def test_verify_exits_with_7_and_names_the_damaged_tensor(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3. Method: flip one bit of a tensor; text and JSON output."""
    step = home / "outputs/checkpoint/step-3"
    flip_a_bit(step / "__0_0.distcp")
    status, said, err = run(capsys, "verify", step)
    assert status == 7
    assert err == f"error: `{step}` is damaged\n"
    assert "`__0_0.distcp` `model.large` block 2: has checksum" in said
    assert "usable: " in said

    status, said, err = run(capsys, "verify", step, "--json")
    found: dict[str, Any] = json.loads(said)
    assert (status, found["good"]) == (7, False)
    (finding,) = found["checkpoints"][0]["findings"]
    assert (finding["entry"], finding["block"]) == ("model.large", 2)
    assert run(capsys, "verify", step, "--quick")[0] == 0


def test_verify_checks_every_checkpoint_in_a_folder_and_says_which_one_a_resume_takes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: of three checkpoints the newest has damaged data, the oldest a damaged index."""
    folder = home / "outputs/checkpoint"
    flip_a_bit(folder / "step-3/__0_0.distcp")
    flip_a_bit(folder / "step-1/manifest.json")
    status, said, err = run(capsys, "verify", folder)
    assert status == 7
    assert err.startswith("error: 2 of 3 checkpoints are damaged\nhint: with `--mark`")
    assert said.splitlines()[-1] == "a resume takes step 2"
    assert json.loads(run(capsys, "verify", folder, "--json")[1])["resume"] == 2


def test_list_and_resume_skip_checkpoints_that_verify_has_marked(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G5. Method: flip a bit of the newest checkpoint, `verify --mark` of the folder and of the
    checkpoint; then repair it."""
    folder = home / "outputs/checkpoint"
    data = folder / "step-3/__0_0.distcp"
    whole = data.read_bytes()
    flip_a_bit(data)
    assert run(capsys, "verify", folder)[0] == 7
    assert json.loads(run(capsys, "list", folder, "--json")[1])["resume"] == 3
    for path in (folder, folder / "step-3"):
        assert run(capsys, "verify", path, "--mark")[0] == 7
        found = json.loads(run(capsys, "list", folder, "--json")[1])
        assert found["resume"] == 2
        data.write_bytes(whole)
        assert run(capsys, "verify", path, "--mark")[0] == 0
        assert json.loads(run(capsys, "list", folder, "--json")[1])["resume"] == 3
        flip_a_bit(data)
    for path, more in ((home / "stock", ()), (folder, ("--quick",))):
        assert run(capsys, "verify", path, "--mark", *more)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (("verify", "missing"), 4, "nothing at"),
        (("list", "missing"), 4, "nothing at"),
        (("list", "hf"), 4, "holds no step"),
        (("list", "outputs"), 4, "hint: there are some in"),
        (("list", "stock"), 4, "hint: it is a checkpoint itself: holdfast verify"),
        (("list", "hf"), 4, "hint: it is a checkpoint itself: holdfast verify"),
        (("list", "."), 4, "hint: no `step-N`, but checkpoints: hf, stock; holdfast verify"),
        (("list", "model.pt"), 4, "a file, written by torch.save"),
        (("doctor", "model.pt"), 4, "model.pt FOLDER` makes a checkpoint of it"),
        (("prune", "model.pt"), 4, "a file, written by torch.save"),
        (("report", "model.pt"), 4, "`holdfast show "),
        (("serve", "model.pt"), 4, "a file, written by torch.save"),
        (("list", "hf/model-00001-of-00002.safetensors"), 4, "a file, of safetensors"),
        (("list", "notes.txt"), 4, "it is a text file"),
        (("list", "stock/.metadata"), 2, "is the index for stock torch"),
        (("verify", "evil.pt"), 8, "refers to `posix.system`"),
        (("verify", "notes.txt"), 4, "is no checkpoint"),
        (("lst",), 2, "did you mean `holdfast list`?"),
        ((), 2, f"commands: {', '.join(COMMANDS)}"),
    ],
)
def test_a_mistake_prints_one_error_and_exits_with_its_documented_status(
    saved: Path,
    arguments: tuple[str, ...],
    status: int,
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G8. Method: wrong paths and commands, and a `.pt` file whose pickle would run a program."""
    import torch

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    monkeypatch.chdir(saved)
    torch.save({"a": Attack()}, "evil.pt")
    Path("notes.txt").write_text("some notes, no checkpoint")
    ended, said, err = run(capsys, *arguments)
    assert (ended, said) == (status, "")
    assert err.startswith("error: ")
    assert error in err
    assert "Traceback" not in err
    assert not Path("ran").exists()


def test_debug_prints_the_traceback_of_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: verify a path that does not exist."""
    status, _, err = run(capsys, "verify", tmp_path / "missing", "--debug")
    assert status == 4
    assert "Traceback" in err
    assert "error: " in err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("skills", "train")])
def test_the_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: `--help` of each command exits with 0, unknown options with 2."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"Example: holdfast {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([command, "--nope"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err


def test_help_lists_every_command_and_version_prints_what_is_installed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Method: `holdfast --help` and `holdfast version`."""
    status, said, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"  {command} " in said for command in COMMANDS)
    found = json.loads(run(capsys, "version", "--json")[1])
    assert {"holdfast", "python", "torch"} <= found.keys()
    assert run(capsys, "--version")[1].startswith("holdfast ")


def child(*arguments: str | Path, script: str = "") -> subprocess.CompletedProcess[str]:
    code = script or "import sys; from holdfast.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True)


@pytest.mark.parametrize("module", ["holdfast", "holdfast.cli"])
def test_the_package_can_be_run_as_a_module(module: str, tmp_path: Path) -> None:
    """Method: `python -m`, with a command that succeeds and one that fails."""
    command = [sys.executable, "-W", "error", "-m", module]
    ran = subprocess.run([*command, "version"], text=True, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"holdfast {holdfast.__version__}\n" in ran.stdout
    ran = subprocess.run([*command, "list", tmp_path / "none"], text=True, capture_output=True)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: nothing at")


def test_train_becomes_the_launcher(tmp_path: Path) -> None:
    """Method: its help; a missing file of settings; an unknown setting."""
    ran = child("train", "--help")
    assert ran.returncode == 0, ran.stderr
    assert "Example: holdfast train" in ran.stdout
    assert "--checkpoint.interval" in ran.stdout
    ran = child("train", "--job.config_file", tmp_path / "nope.toml")
    assert ran.returncode == 4
    assert "there is no file" in ran.stderr
    ran = child("train", "--training.stepz", "3")
    assert ran.returncode == 2
    assert "did you mean `training.steps`?" in ran.stderr


def test_no_command_imports_torch(saved: Path) -> None:
    """Method: run commands in fresh interpreters, then check `sys.modules`."""
    script = (
        "import sys\nfrom holdfast.cli.main import main\n"
        "assert main() == 0\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    paths = [saved / one for one in ("outputs/checkpoint", "stock", "hf", "model.pt")]
    quiet = (("version",), ("skills", "list"))
    value = ("show", paths[0] / "step-3", "train_state.step")
    for arguments in (*quiet, value, ("list", paths[0]), *(("verify", path) for path in paths)):
        ran = child(*arguments, script=script)
        assert ran.returncode == 0, ran.stderr


def test_list_loads_no_package_but_xxhash(saved: Path) -> None:
    """Imports take most of the time of a command; `python -m benchmarks.run` measures it.
    Method: run it in a fresh interpreter, then check `sys.modules`."""
    script = (
        "import sys\nfrom holdfast.cli.main import main\nassert main() == 0\n"
        "packages = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(*packages, file=sys.stderr)"
    )
    ran = child("list", saved / "outputs/checkpoint", script=script)
    loaded = {name for name in ran.stderr.split() if not name.startswith("_")}
    assert loaded - {"sitecustomize"} == {"holdfast", "xxhash"}


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_a_table_in_colour_unless_no_color_is_set(
    saved: Path, colour: bool
) -> None:
    """Method: run the command on a pseudo terminal, with and without NO_COLOR."""
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    if not colour:
        environment["NO_COLOR"] = "1"
    command = [sys.executable, "-m", "holdfast.cli", "list", str(saved / "outputs/checkpoint")]
    ran = subprocess.Popen(command, stdout=there, stderr=there, env=environment)
    os.close(there)
    said = b""
    while True:
        try:
            part = os.read(here, 4096)
        except OSError:
            break
        if not part:
            break
        said += part
    os.close(here)
    assert ran.wait() == 0
    assert "│".encode() in said
    assert b"resume" in said
    assert (b"\x1b[32m" in said) == colour


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: with no time between lines; with the usual time, which a short check does not reach;
    on a pseudo terminal."""
    step = saved / "outputs/checkpoint/step-3"
    monkeypatch.setattr(terminal, "LINE_S", 0.0)
    status, _, err = run(capsys, "verify", step)
    assert status == 0
    lines = err.splitlines()
    assert all(line.startswith("step-3: ") and line.endswith(" s left") for line in lines)
    assert " MB of 2.4 MB, " in lines[-1]
    monkeypatch.undo()
    assert run(capsys, "verify", step)[2] == ""
    here, there = pty.openpty()
    command = [sys.executable, "-m", "holdfast.cli", "verify", str(step)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=there, text=True)
    os.close(there)
    said = os.read(here, 1 << 16)
    os.close(here)
    assert ran.returncode == 0
    assert "good" in ran.stdout
    assert "━".encode() in said


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("list",), "manifest"),
        (("verify",), "manifest"),
        (("list", "--verify"), "distcp"),
        (("verify", "--mark"), "distcp"),
        (("doctor", "--verify"), "distcp"),
    ],
)
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(
    command: tuple[str, ...],
    file: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G4, G16. Method: delete steps 1 and 2, as retention does, at the first read of a file of step
    1, when both are listed already. The command leaves both out, and marks neither as damaged.
    """
    folder = home / "outputs/checkpoint"
    catalog, read = Catalog(LocalStore(folder)), LocalStore.read
    deleted: list[str] = []

    def deleting(store: LocalStore, key: str, start: int, stop: int) -> bytes:
        if not deleted and "step-1/" in key and file in key:
            deleted.append(key)
            for step in (1, 2):
                catalog.store.remove(catalog.set_aside_for_deletion(f"step-{step}"))
        return read(store, key, start, stop)

    monkeypatch.setattr(LocalStore, "read", deleting)
    status, said, err = run(capsys, command[0], folder, *command[1:])
    assert deleted
    assert status == 0, err
    assert "damaged" not in said
    assert ("deleted meanwhile" in err) == (command != ("list",))
    assert sorted(path.name for path in folder.iterdir()) == ["step-3"]


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_550_000, "1.6 MB"), (2 * 10**15, "2.0 PB")],
)
def test_bytes_are_spelled_for_people(nbytes: int, said: str) -> None:
    assert spelled_bytes(nbytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 s"), (5, "5 s"), (300, "5 min"), (7200, "2 h"), (86400 * 3, "3 d")],
)
def test_ages_are_spelled_for_people(seconds: float, said: str) -> None:
    assert spelled_age(seconds) == said
