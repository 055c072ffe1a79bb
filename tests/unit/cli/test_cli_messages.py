"""Error messages of commands: the path, the file, and the next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import holdfast
from holdfast.cli.main import main


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two checkpoints of a run, a Hugging Face folder, a `.pt` file."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    config = holdfast.CheckpointConfig(enable=True, interval=1)
    with holdfast.CheckpointManager("run", model=model, config=config) as manager:
        manager.save(1)
        manager.save(2)
    Path("hf").mkdir()
    save_file({"a": torch.ones(2)}, "hf/model.safetensors")
    torch.save(model.state_dict(), "w.pt")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command; returns its exit status, stdout and stderr."""
    status = main([*arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("command", ["list", "doctor", "prune"])
def test_a_hint_has_the_full_path_of_a_checkpoint_or_of_the_folder_of_a_run(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8. Method: a checkpoint, and the folder above a run's, in place of a run's folder."""
    status, _, err = run(capsys, command, "run/step-1")
    assert status == 4
    assert f"hint: it is a checkpoint itself: holdfast verify {home}/run/step-1\n" in err
    status, _, err = run(capsys, command, ".")
    assert status == 4
    assert f"hint: there are some in {home}/run\n" in err


@pytest.mark.parametrize("command", ["show", "list", "verify", "doctor", "prune", "report"])
def test_a_path_that_does_not_exist_has_a_hint(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G11. Method: a name with a typing error, an unlike one, and one in a missing folder."""
    for path, hint in (
        ("runs", "beside it: `run`"),
        ("xyz", "beside it: `hf`, `run`, `w.pt`"),
        ("xyz/step-1", f"the folder `{home}/xyz` does not exist either"),
    ):
        status, _, err = run(capsys, command, path)
        assert (status, err) == (4, f"error: nothing at `{home}/{path}`\nhint: {hint}\n")


def test_a_folder_above_several_runs_names_them(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G11. Method: two runs, then five."""
    shutil.copytree("run", "other")
    err = run(capsys, "list", ".")[2]
    assert f"hint: there are some in {home}/other, {home}/run\n" in err
    for name in "abc":
        shutil.copytree("run", name)
    err = run(capsys, "list", ".")[2]
    assert f"hint: there are some in {home}/a, {home}/b, {home}/c and in more folders\n" in err


def test_show_of_a_sealed_folder_names_a_file_that_it_can_show(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G11. Method: run the command with the path of the hint."""
    with holdfast.sealed("sealed") as folder:
        (folder / "a.txt").write_text("notes")
        (folder / "a.bin").write_text("no checkpoint")
        torch.save({"a": torch.ones(2)}, folder / "state.pt")
    status, _, err = run(capsys, "show", "sealed")
    assert status == 4
    assert err.endswith(f"hint: give the path of a file in it, such as {home}/sealed/state.pt\n")
    assert run(capsys, "show", f"{home}/sealed/state.pt")[0] == 0


def test_help_says_which_arguments_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("show", ("PATH [NAME]", "List every layer")),
        ("serve", ("(one or more)",)),
        ("skills show", ("NAME [FILE]", "(default: SKILL.md)")),
    ):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        said = capsys.readouterr().out
        assert all(word in said for word in words)
        assert "(default: )" not in said
        assert "(default: '')" not in said


def test_an_export_names_the_file_that_it_cannot_map(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "convert", "w.pt", "new", "--to", "hf")
    assert status == 2
    assert f"error: the tensors of `{home}/w.pt` have the names of no supported model" in err


@pytest.mark.parametrize(
    "command",
    [("diff", "run/step-1", "run/step-2"), ("show", "run/step-2", "weight", "--stats")],
)
def test_a_data_file_that_is_missing_is_damage(
    command: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G3, G8. Method: delete the only data file of a checkpoint. The exit status is 7, and the hint
    names the command that lists the damage.
    """
    (home / "run/step-2/__0_0.distcp").unlink()
    status, _, err = run(capsys, *command)
    assert status == 7
    assert f"`{home}/run/step-2/__0_0.distcp` is missing" in err
    assert f"hint: `holdfast verify {home}/run/step-2` lists what is damaged" in err


@pytest.mark.parametrize("quick", [(), ("--quick",)])
@pytest.mark.parametrize("text", ["{not json", "[1]"])
def test_verify_finds_a_configuration_that_no_command_can_read(
    text: str, quick: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8. Method: a `config.json` that `show` refuses is a finding; a valid one is not."""
    Path("hf/config.json").write_text(json.dumps({"model_type": "llama"}))
    assert run(capsys, "verify", "hf", *quick)[0] == 0
    Path("hf/config.json").write_text(text)
    assert run(capsys, "show", "hf")[0] == 8
    status, said, _ = run(capsys, "verify", "hf", *quick)
    assert status == 7
    assert "config.json` is no configuration" in said


def test_a_report_replaces_an_earlier_report_and_no_other_file(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G14. Method: write a report over a page of the user's, which stays; and over a report."""
    mine = home / "mine.html"
    mine.write_text("<!doctype html>mine")
    status, _, err = run(capsys, "report", "run", "--out", "mine.html")
    assert status == 5
    assert "is not a page of `holdfast report`" in err
    assert mine.read_text() == "<!doctype html>mine"
    for _ in range(2):
        assert run(capsys, "report", "run", "--out", "page.html")[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        ("list", "~/run"),
        ("verify", "~"),
        ("convert", "~/run/step-1", "new"),
        ("convert", "run/step-1", "~/new"),
        ("report", "run", "--out", "~/page.html"),
    ],
)
def test_a_path_that_starts_with_a_tilde_is_refused(
    command: tuple[str, ...], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8. Method: every command that takes a path. None creates a folder named `~`."""
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "starts with `~`" in err
    assert "os.path.expanduser" in err
    assert not (home / "~").exists()
