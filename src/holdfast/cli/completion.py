"""`holdfast completion`: print the script with which a shell completes commands and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union

import tyro

from holdfast.cli.terminal import POSITIONAL, Options, parsed, with_tyro


@dataclass(frozen=True, slots=True)
class CompletionArguments(Options):
    """Print the script with which a shell completes commands and their options.

    Example: holdfast completion bash > ~/.local/share/bash-completion/completions/holdfast
    """

    shell: Literal["bash", "zsh"] = field(metadata=POSITIONAL)
    """bash or zsh."""


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast completion`: print the script for the shell, and exit the process."""
    from holdfast.cli import main, skills

    options = parsed(CompletionArguments, "completion", arguments)
    kinds: dict[str, Any] = options_of_commands()
    # Complete only the name of `train`, since it takes hundreds of settings.
    kinds["train"] = make_dataclass("train", [])
    summaries = {name: summary for name, (summary, _, _) in skills.COMMANDS.items()}
    kinds["skills"] = _one_of({name: kinds[f"skills {name}"] for name in summaries}, summaries)
    tyro.cli(
        _one_of(kinds, main.COMMANDS),
        prog="holdfast",
        args=["--tyro-print-completion", options.shell],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return 0


def options_of_commands() -> dict[str, type[Any]]:
    """Return command -> dataclass of its options, for all commands except `train`.

    The commands of `holdfast skills` have keys such as `skills sync`.
    """
    from holdfast.cli import main, skills

    kinds = {}
    for name in main.COMMANDS:
        if name not in ("skills", "train"):
            module = import_module(f"holdfast.cli.{name}")
            kinds[name] = with_tyro(getattr(module, f"{name.capitalize()}Arguments"))
    below = {f"skills {name}": with_tyro(kind) for name, (_, kind, _) in skills.COMMANDS.items()}
    return kinds | below


def _one_of(kinds: Mapping[str, Any], summaries: Mapping[str, str]) -> Any:
    """Return a type that tells tyro that a command line begins with one of several commands.

    `kinds`: dataclass of options, by command. `summaries`: text for the help, by command.
    """
    members = [
        Annotated[kinds[name], tyro.conf.subcommand(name, description=summary)]
        for name, summary in summaries.items()
    ]
    return Union[tuple(members)]  # noqa: UP007 - made from a list
