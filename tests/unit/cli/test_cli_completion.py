"""`holdfast completion`: the shell completes every verb and its options."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from holdfast.cli import skills
from holdfast.cli.list import ListArguments
from holdfast.cli.main import VERBS, main
from holdfast.cli.terminal import named, plainly


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    return capsys.readouterr().out


def test_bash_completes_verbs_and_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: the function of the script, in a real bash, as a press of the tab key calls it."""
    script = tmp_path / "completion.bash"
    script.write_text(script_of("bash", capsys))

    def completed(*words: str) -> list[str]:
        asked = (
            f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
            "function=$(complete -p holdfast | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            f"$function holdfast '{words[-1]}' '{words[-2]}'; echo \"${{COMPREPLY[@]}}\""
        )
        ran = subprocess.run(["bash", "-c", asked], text=True, capture_output=True, check=True)
        return ran.stdout.split()

    assert completed("holdfast", "ver") == ["verify", "version"]
    for verb in VERBS:
        assert completed("holdfast", verb) == [verb]
    for verb in skills.VERBS:
        assert completed("holdfast", "skills", verb) == [verb]
    assert completed("holdfast", "verify", "--q") == ["--quick"]
    assert "--dry-run" in completed("holdfast", "skills", "sync", "--d")


def test_zsh_has_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert script_of("zsh", capsys).startswith("#compdef holdfast")


@pytest.mark.parametrize(
    "arguments",
    [
        *("F", "F --json", "--json F --debug", "F N", "F N --json --debug", "", "--json", "-"),
        *("F --nothing", "F G H", "F --verify", "F --dry-run", "F --name N", "F --json --json"),
    ],
)
def test_what_is_read_without_tyro_is_what_tyro_reads(arguments: str) -> None:
    """Method: every verb with a class, the fast way beside the slow one, wherever it has one."""
    given = arguments.split()
    for verb in VERBS:
        module = import_module(f"holdfast.cli.{verb}")
        kind = getattr(module, verb.capitalize(), None)
        if kind is None or (plain := plainly(kind, given)) is None:
            continue
        flags = (tyro.conf.FlagCreatePairsOff,)
        assert plain == tyro.cli(named(kind), args=given, config=flags)
    assert plainly(ListArguments, ["F"]) == ListArguments("F")
    assert plainly(ListArguments, ["F", "--jsn"]) is None
