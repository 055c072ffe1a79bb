"""The verbs `list`, `verify` and `version`: what they print where, and how they end."""

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
from holdfast.cli.main import VERBS, main
from holdfast.spelling import spelled_age, spelled_bytes
from holdfast.storage.local import LocalStore


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps that two ranks wrote, and one checkpoint of every other kind."""
    home = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        save_step(home / "outputs/checkpoint", step)
    save_stock(home / "stock")
    save_safetensors(home / "hf")
    save_torch(home / "model.pt")
    return home


@pytest.fixture
def home(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "home"))


def damage(path: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_list_shows_each_step_and_which_one_a_resume_takes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: three steps, the newest cut short, and what a killed save left."""
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


def test_list_reads_all_data_where_asked_and_knows_pins_and_folders_of_hugging_face(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: a bit flipped, which sizes do not show; a step pinned; a step that holds
    safetensors; one that a run has marked. The status is that of `verify`."""
    folder = home / "outputs/checkpoint"
    damage(folder / "step-2/__0_0.distcp")
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


def test_list_and_verify_end_alike(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """G4. Method: all whole; one marked that is whole; one damaged; one whose index is gone."""
    folder = home / "outputs/checkpoint"
    changes: list[Callable[[], object]] = [
        lambda: None,
        (folder / ".damaged-step-3").touch,
        lambda: damage(folder / "step-2/__0_0.distcp"),
        (folder / "step-1/manifest.json").unlink,
    ]
    for change in changes:
        change()
        found = [run(capsys, verb, folder, *more)[0] for verb, more in (("verify", ()), LISTED)]
        assert found[0] == found[1]
    assert found == [7, 7]


LISTED = ("list", ("--verify",))


@pytest.mark.parametrize("path", ["outputs/checkpoint", "stock", "hf", "model.pt"])
def test_verify_passes_what_is_whole(
    saved: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3. Method: every kind of checkpoint, all of it and its structure alone."""
    for more in ((), ("--quick",)):
        status, said, err = run(capsys, "verify", saved / path, *more)
        assert (status, err) == (0, ""), said
        assert "good" in said or "structure is whole" in said


def test_verify_ends_with_7_and_names_what_is_damaged(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3. Method: one bit of a tensor; text for people, JSON for programs."""
    step = home / "outputs/checkpoint/step-3"
    damage(step / "__0_0.distcp")
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


def test_verify_of_a_folder_checks_every_step_and_says_which_one_a_resume_takes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the newest of three damaged in its data, the oldest in its index."""
    folder = home / "outputs/checkpoint"
    damage(folder / "step-3/__0_0.distcp")
    damage(folder / "step-1/manifest.json")
    status, said, err = run(capsys, "verify", folder)
    assert status == 7
    assert err.startswith("error: 2 of 3 checkpoints are damaged\nhint: with `--mark`")
    assert said.splitlines()[-1] == "a resume takes step 2"
    assert json.loads(run(capsys, "verify", folder, "--json")[1])["resume"] == 2


def test_what_verify_found_is_known_from_then_on_where_it_leaves_marks(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G5. Method: a bit of the newest step, in its folder and as a step alone; then mended."""
    folder = home / "outputs/checkpoint"
    data = folder / "step-3/__0_0.distcp"
    whole = data.read_bytes()
    damage(data)
    assert run(capsys, "verify", folder)[0] == 7
    assert json.loads(run(capsys, "list", folder, "--json")[1])["resume"] == 3
    for path in (folder, folder / "step-3"):
        assert run(capsys, "verify", path, "--mark")[0] == 7
        found = json.loads(run(capsys, "list", folder, "--json")[1])
        assert found["resume"] == 2
        data.write_bytes(whole)
        assert run(capsys, "verify", path, "--mark")[0] == 0
        assert json.loads(run(capsys, "list", folder, "--json")[1])["resume"] == 3
        damage(data)
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
        ((), 2, f"verbs: {', '.join(VERBS)}"),
    ],
)
def test_a_mistake_is_one_error_with_the_status_of_the_documents(
    saved: Path,
    arguments: tuple[str, ...],
    status: int,
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G8. Method: wrong paths and verbs, and a `.pt` file that would run a command."""
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


def test_debug_shows_where_an_error_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: a missing path."""
    status, _, err = run(capsys, "verify", tmp_path / "missing", "--debug")
    assert status == 4
    assert "Traceback" in err
    assert "error: " in err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("skills", "train")])
def test_help_has_an_example_and_ends_well(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Method: `--help` of each verb; wrong arguments end with 2."""
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"Example: holdfast {verb}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([verb, "--nope"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err


def test_help_names_every_verb_and_version_what_is_installed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Method: `holdfast --help` and `holdfast version`."""
    status, said, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"  {verb} " in said for verb in VERBS)
    found = json.loads(run(capsys, "version", "--json")[1])
    assert {"holdfast", "python", "torch"} <= found.keys()
    assert run(capsys, "--version")[1].startswith("holdfast ")


def child(*arguments: str | Path, script: str = "") -> subprocess.CompletedProcess[str]:
    code = script or "import sys; from holdfast.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True)


@pytest.mark.parametrize("module", ["holdfast", "holdfast.cli"])
def test_the_package_is_the_command_too(module: str, tmp_path: Path) -> None:
    """Method: `python -m`, with a verb that ends well and one that does not."""
    command = [sys.executable, "-W", "error", "-m", module]
    ran = subprocess.run([*command, "version"], text=True, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"holdfast {holdfast.__version__}\n" in ran.stdout
    ran = subprocess.run([*command, "list", tmp_path / "none"], text=True, capture_output=True)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: nothing at")


def test_training_starts_as_by_its_script(tmp_path: Path) -> None:
    """Method: its help; a file of settings that is not there; none, away from the project."""
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


def test_no_verb_imports_torch(saved: Path) -> None:
    """Method: each verb in a fresh interpreter, then a look at the modules it has loaded."""
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


def test_list_loads_nothing_large(saved: Path) -> None:
    """What a verb takes is mostly what it imports; `python -m benchmarks.run` has the figure.
    Method: the packages that a fresh interpreter holds after the command."""
    script = (
        "import sys\nfrom holdfast.cli.main import main\nassert main() == 0\n"
        "packages = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(*packages, file=sys.stderr)"
    )
    ran = child("list", saved / "outputs/checkpoint", script=script)
    loaded = {name for name in ran.stderr.split() if not name.startswith("_")}
    assert loaded - {"sitecustomize"} == {"holdfast", "xxhash"}


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_there_is_a_table_and_no_color_is_respected(
    saved: Path, colour: bool
) -> None:
    """Method: the command on a pseudo terminal, with and without NO_COLOR."""
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


def test_progress_is_a_bar_on_a_terminal_and_a_line_at_times_in_a_log(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method: the lines with no time between them; then as it is, where a check takes less than
    that; a bar on a pseudo terminal, that is gone when it is done."""
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


def test_a_reader_that_has_seen_enough_is_no_error(saved: Path) -> None:
    """Method: stdout closed before anything is written to it."""
    command = f"{sys.executable} -m holdfast.cli list {saved}/outputs/checkpoint --json | true"
    ran = subprocess.run(command, shell=True, text=True, capture_output=True)
    assert ran.stderr == ""


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
def test_a_step_that_is_deleted_while_it_is_read_is_not_damaged(
    command: tuple[str, ...],
    file: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G4, G16. Method: retention deletes steps 1 and 2 once both are listed and a file of the first
    is read. They are left out, and neither called damaged nor marked."""
    folder = home / "outputs/checkpoint"
    catalog, read = Catalog(LocalStore(folder)), LocalStore.read
    deleted: list[str] = []

    def deleting(store: LocalStore, key: str, start: int, stop: int) -> bytes:
        if not deleted and "step-1/" in key and file in key:
            deleted.append(key)
            for step in (1, 2):
                catalog.remove(f"step-{step}")
        return read(store, key, start, stop)

    monkeypatch.setattr(LocalStore, "read", deleting)
    status, said, err = run(capsys, command[0], folder, *command[1:])
    assert deleted
    assert status == 0, err
    assert "damaged" not in said
    assert ("deleted meanwhile" in err) == (command != ("list",))
    assert sorted(path.name for path in folder.iterdir()) == ["step-3"]


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a line in which `holdfast` is the command."""
    line = line.replace("holdfast ", f"{sys.executable} -m holdfast.cli ")
    return subprocess.run(["bash", "-c", line], text=True, capture_output=True)


@pytest.mark.parametrize("verb", ["list", "list --json", "verify", "list --help", "--help"])
def test_output_that_cannot_be_written_is_one_error(verb: str, saved: Path) -> None:
    """G8. Method: stdout is a full disk: one line and its hint, no traceback, status 9."""
    folder = "" if "--help" in verb else saved / "outputs/checkpoint"
    ran = shell(f"holdfast {verb} {folder} > /dev/full")
    assert ran.stderr.startswith("error: cannot write the output: No space left on device\nhint: ")
    assert len(ran.stderr.splitlines()) == 2
    assert ran.returncode == 9


def test_a_closed_stream_is_no_error(saved: Path) -> None:
    """G8. Method: stdout closed by the shell, for a command that ends well and one that does not;
    stderr closed, or full: the exit status is all there is, and is the right one."""
    ran = shell(f"holdfast list {saved}/outputs/checkpoint >&-")
    assert (ran.stderr, ran.returncode) == ("", 0)
    ran = shell(f"holdfast list {saved}/nothing >&-")
    assert ran.stderr.startswith("error: nothing at")
    assert ran.returncode == 4
    for closed in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert shell(f"holdfast list {saved}/nothing {closed}").returncode == 4


def test_a_character_that_the_output_cannot_spell_is_escaped(tmp_path: Path) -> None:
    """G8. Method: a tensor with a name that ASCII lacks, on stdout and in an error."""
    import torch

    holdfast.save(tmp_path / "step-1", {"gr\u00f6\u00dfe": torch.ones(2)})
    ran = shell(f"PYTHONUTF8=0 PYTHONIOENCODING=ascii holdfast show {tmp_path}/step-1")
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert "gr\\xf6\\xdfe" in ran.stdout
    ran = shell(f"PYTHONUTF8=0 PYTHONIOENCODING=ascii holdfast show {tmp_path}/gr\u00f6\u00dfe")
    assert (ran.stdout, ran.returncode) == ("", 4)
    assert "gr\\xf6\\xdfe" in ran.stderr


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
