"""`holdfast completion`, and the parser that skips tyro for simple command lines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tyro

from holdfast.cli.completion import options_of_commands
from holdfast.cli.list import ListArguments
from holdfast.cli.main import COMMANDS, main
from holdfast.cli.skills import COMMANDS as SKILLS_COMMANDS
from holdfast.cli.terminal import parsed_without_tyro

OPTIONS = options_of_commands()


def script_of(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert not ended.value.code
    return capsys.readouterr().out


def test_bash_completes_commands_and_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Method: call the function of the script in a real bash, as pressing the tab key does."""
    script = tmp_path / "completion.bash"
    script.write_text(script_of("bash", capsys))

    def completed(*words: str) -> list[str]:
        code = (
            f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
            "function=$(complete -p holdfast | sed 's/.*-F \\([^ ]*\\).*/\\1/'); "
            f"$function holdfast '{words[-1]}' '{words[-2]}'; echo \"${{COMPREPLY[@]}}\""
        )
        ran = subprocess.run(["bash", "-c", code], text=True, capture_output=True, check=True)
        return ran.stdout.split()

    assert completed("holdfast", "ver") == ["verify", "version"]
    for command in COMMANDS:
        assert completed("holdfast", command) == [command]
    for command in SKILLS_COMMANDS:
        assert completed("holdfast", "skills", command) == [command]
    for command in OPTIONS:
        assert "--debug" in completed("holdfast", *command.split(), "--d")
    assert completed("holdfast", "verify", "--q") == ["--quick"]
    assert "--dry-run" in completed("holdfast", "skills", "sync", "--d")


def test_zsh_has_a_completion_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert script_of("zsh", capsys).startswith("#compdef holdfast")


SIMPLE = (
    "",
    "F",
    "F --json",
    "--json F --debug",
    "F N",
    "F N --json --debug",
    "--json",
    "F --verify",
)
OTHER = (
    "-",
    "F --nothing",
    "F G H",
    "F --keep-best-k 3",
    "F --json --json",
    "F --json=true",
    "-- F",
)


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize("line", SIMPLE + OTHER)
def test_command_lines_parsed_without_tyro_give_what_tyro_gives(command: str, line: str) -> None:
    """A fast path skips work, and gives the same result. Method: every command, each line by both
    parsers, wherever the fast one takes the line."""
    kind, arguments = OPTIONS[command], line.split()
    simple = parsed_without_tyro(kind, arguments)
    if simple is not None:
        assert simple == tyro.cli(kind, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))


def test_tyro_is_skipped_for_simple_command_lines_only() -> None:
    """Method: lines that the fast path must take, and lines that it must leave to tyro."""
    taken = {line: parsed_without_tyro(ListArguments, line.split()) for line in OTHER}
    assert taken == dict.fromkeys(OTHER)
    assert parsed_without_tyro(ListArguments, ["F"]) == ListArguments("F")
    assert parsed_without_tyro(ListArguments, ["--json", "F"]) == ListArguments("F", json=True)
