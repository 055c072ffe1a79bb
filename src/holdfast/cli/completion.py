"""`holdfast completion`: what a shell needs to complete verbs and their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union

import tyro

from holdfast.cli.terminal import named, parsed


@dataclass(frozen=True, slots=True)
class CompletionArguments:
    """Print the script that lets a shell complete verbs and their options.

    Example: holdfast completion bash > ~/.local/share/bash-completion/completions/holdfast
    """

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """bash or zsh."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Print the script; ends the process."""
    from holdfast.cli.main import VERBS

    asked = parsed(CompletionArguments, "completion", arguments)
    tyro.cli(
        _one_of("holdfast.cli", VERBS),
        prog="holdfast",
        args=["--tyro-print-completion", asked.shell],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return 0


def _one_of(package: str, verbs: Mapping[str, str]) -> Any:
    """The type of a command line that begins with one of these verbs."""
    kinds = []
    for verb, does in verbs.items():
        module = import_module(f"{package}.{verb}") if package == "holdfast.cli" else None
        below = getattr(module, "VERBS", None)
        if below:
            kind = _one_of(f"{package}.{verb}", below)
        else:
            home = module or import_module(package)
            group = package.rpartition(".")[2].capitalize()
            called = f"{verb.capitalize()}Arguments" if module else f"{group}{verb.capitalize()}"
            found = getattr(home, called, None)
            kind = named(found) if found else make_dataclass(verb, [])
        kinds.append(Annotated[kind, tyro.conf.subcommand(verb, description=does)])
    return Union[tuple(kinds)]  # noqa: UP007 - made from a list
