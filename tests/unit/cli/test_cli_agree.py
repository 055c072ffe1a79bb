"""Every command, retention and the resume itself agree on the checkpoint that a resume takes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import copy_step, save_safetensors, save_step, save_stock
from holdfast.catalog.catalog import Catalog
from holdfast.catalog.marks import mark_damaged
from holdfast.cli.main import main
from holdfast.cli.prune import Decision
from holdfast.manager.resume import good_steps, newest_resumable
from holdfast.planning import index
from holdfast.storage.local import LocalStore

KINDS: dict[str, Callable[[Path], None]] = {}
"""Ways to change the newest checkpoint, `step-90`, so that no resume may take it."""

WHOLE: dict[str, Callable[[Path], None]] = {}
"""Ways to change it so that a resume may still take it."""


def kind(make: Callable[[Path], None]) -> Callable[[Path], None]:
    KINDS[make.__name__] = make
    return make


def whole(make: Callable[[Path], None]) -> Callable[[Path], None]:
    WHOLE[make.__name__] = make
    return make


def emptied(path: Path) -> Path:
    shutil.rmtree(path)
    path.mkdir()
    return path


@kind
def a_copy_under_another_number(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-10"), path)


@kind
def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@kind
def a_flipped_bit_in_the_manifest(path: Path) -> None:
    data = bytearray((path / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "manifest.json").write_bytes(data)


@kind
def no_stock_index(path: Path) -> None:
    (path / ".metadata").unlink()


@kind
def a_file_that_is_gone(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


@kind
def a_file_that_is_short(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 1000)


def with_rows_instead(path: Path) -> None:
    """Save the newest checkpoint again, with an `index.bin`."""
    shutil.rmtree(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LISTED_CHUNKS_MAX", 0)
        save_step(path.parent, 90)


@kind
def a_flipped_bit_in_the_rows(path: Path) -> None:
    with_rows_instead(path)
    data = bytearray((path / "index.bin").read_bytes())
    data[100] ^= 1
    (path / "index.bin").write_bytes(data)


@kind
def a_pipe_for_the_rows(path: Path) -> None:
    with_rows_instead(path)
    (path / "index.bin").unlink()
    os.mkfifo(path / "index.bin")


@kind
def a_pipe_for_a_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


@kind
def a_pipe_for_an_index(path: Path) -> None:
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")


@kind
def a_socket_for_data(path: Path) -> None:
    (path / "__0_0.distcp").unlink()
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path)  # The path of a socket is short.
        try:
            one.bind("__0_0.distcp")
        finally:
            os.chdir(here)


@kind
def a_tebibyte_for_a_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 1 << 40)


@kind
def half_a_gibibyte_of_nothing_for_a_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"")
    os.truncate(path / "manifest.json", 1 << 29)


@kind
def a_tebibyte_for_an_index(path: Path) -> None:
    os.truncate(path / ".metadata", 1 << 40)


@kind
def a_tebibyte_of_data(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 1 << 40)


@kind
def a_link_in_a_circle(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("other")
    (path / "other").symlink_to("manifest.json")


@kind
def a_link_out(path: Path) -> None:
    (path / "__0_0.distcp").unlink()
    (path / "__0_0.distcp").symlink_to("../step-10/__0_0.distcp")


@kind
def a_manifest_that_is_a_link_out(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("../step-10/manifest.json")


@kind
def a_folder_for_a_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


@kind
def an_empty_folder(path: Path) -> None:
    emptied(path)


@kind
def a_folder_of_something_else(path: Path) -> None:
    (emptied(path) / "thesis.tex").write_text("years")


@kind
def a_link_to_nowhere(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


@kind
def the_model_alone(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    body = text[: text.rindex(',"checksum"')].replace('"kind":"full"', '"kind":"model"') + "}"
    from holdfast.format.checksum import checksum

    sealed = f'{body[:-1]},"checksum":"{checksum(body.encode()):016x}"}}'
    (path / "manifest.json").write_text(sealed)


@kind
def a_folder_of_hugging_face(path: Path) -> None:
    shutil.rmtree(path)
    save_safetensors(path)


@kind
def a_mark_of_damage(path: Path) -> None:
    mark_damaged(LocalStore(path.parent), 90, "a block")


@kind
def a_mark_that_is_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(".damaged-step-90"))


@kind
def an_attempt_alone(path: Path) -> None:
    path.rename(path.with_name(".attempt-step-90-0123abcd"))


@kind
def something_half_removed(path: Path) -> None:
    path.rename(path.with_name(".removing-step-90-0123abcd"))


@kind
def a_name_that_is_no_steps(path: Path) -> None:
    path.rename(path.with_name("step-090"))


@whole
def as_it_was_saved(path: Path) -> None:
    assert path.is_dir()


@whole
def set_aside_by_a_save_that_died(path: Path) -> None:
    path.rename(path.with_name(".replaced-step-90-0123abcd"))


@whole
def of_stock_dcp(path: Path) -> None:
    shutil.rmtree(path)
    save_stock(path)


@whole
def with_rows(path: Path) -> None:
    with_rows_instead(path)


@whole
def with_files_of_people(path: Path) -> None:
    (path / "notes.txt").write_text("looks good")


@whole
def a_link_to_a_step_elsewhere(path: Path) -> None:
    away = path.parent.parent / "away"
    path.rename(away)
    path.symlink_to(away)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good checkpoints."""
    home = tmp_path_factory.mktemp("saved")
    step = save_step(home / "run", 10)
    for number in (20, 90):
        copy_step(step, number)
    return home / "run"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def taken_by_resume(run: Path) -> int | None:
    found, _ = newest_resumable(Catalog(LocalStore(run)), None)
    return None if found is None else found.step


def taken_by_retention(run: Path) -> int | None:
    catalog = Catalog(LocalStore(run))
    good = good_steps(catalog, catalog.folders())
    return max((one.step for one in good if one.resumable), default=None)


def taken_by_command(
    command: str, run: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> int | None:
    capsys.readouterr()
    main([command, str(run), "--json", *more])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    found: int | None = said["resume"]
    return found


def protected_by_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> int | None:
    """Returns the newest step that prune keeps because a resume could take it."""
    capsys.readouterr()
    assert main(["prune", str(run), "--keep-latest-k", "1", "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    decisions = [Decision(**one) for one in said["decisions"]]
    kept = [one.name for one in decisions if "to resume from" in one.why]
    folders = {folder: step for step, folder in Catalog(LocalStore(run)).folders().items()}
    return max((folders[name] for name in kept), default=None)


def everybody(run: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, int | None]]:
    yield "resume", taken_by_resume(run)
    yield "retention", taken_by_retention(run)
    yield "list", taken_by_command("list", run, capsys)
    yield "verify --quick", taken_by_command("verify", run, capsys, "--quick")
    yield "verify", taken_by_command("verify", run, capsys)
    yield "doctor", taken_by_command("doctor", run, capsys)
    yield "prune", protected_by_prune(run, capsys)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", KINDS)
def test_every_command_skips_the_same_checkpoint(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4, G16: one bad checkpoint stops no command, and all take the one before it. Method: change
    the newest checkpoint in every way of `KINDS`; compare the commands."""
    KINDS[name](run / "step-90")
    assert dict(everybody(run, capsys)) == dict.fromkeys(dict(everybody(run, capsys)), 20)


@pytest.mark.parametrize("name", WHOLE)
def test_every_command_takes_the_same_checkpoint(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: change the newest checkpoint in every way of `WHOLE`; compare the commands."""
    WHOLE[name](run / "step-90")
    assert dict(everybody(run, capsys)) == dict.fromkeys(dict(everybody(run, capsys)), 90)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["step-90", "step-90/manifest.json", "step-90/__0_0.distcp"])
def test_every_command_skips_a_checkpoint_that_cannot_be_read(
    what: str,
    number: int,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G4. Method: every system call on a folder or file of the newest checkpoint fails; compare the
    commands that read data, and the resume."""
    refused = str(run / what)

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(refused):
                raise OSError(number, os.strerror(number), path)
            return real(path, *more, **named)

        return call

    for call in ("open", "stat", "scandir", "listdir"):
        monkeypatch.setattr(os, call, failing(getattr(os, call)))
    assert dict(everybody(run, capsys)) == dict.fromkeys(dict(everybody(run, capsys)), 20)


def test_every_command_reports_a_copy_under_another_step(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """G4. Method: the text of each command; `load_step` with its number is refused; retention
    neither counts nor removes it."""
    a_copy_under_another_number(run / "step-90")
    for command in ("list", "verify"):
        capsys.readouterr()
        main([command, str(run)])
        assert "it holds step 10: it is a copy of that step" in capsys.readouterr().out
    assert main(["prune", str(run), "--keep-latest-k", "1", "--damaged"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:-1]}
    assert "keep  it holds step 10" in rows["step-90"]
    assert (run / "step-90").is_dir()
    assert (run / "step-20").is_dir()
