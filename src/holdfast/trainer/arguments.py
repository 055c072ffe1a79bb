"""Read a `Config` from a TOML file and the command line.

The command line overrides the file, the file overrides the defaults. The values of the file and of
the command line are collected by section and key, and the same function checks both.
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from holdfast.arguments import (
    described,
    first_fit,
    fitted,
    is_list,
    members,
    misfit,
    nearest,
    of_length,
)
from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.skills.startup import refresh
from holdfast.trainer import titan
from holdfast.trainer.config import Config

Values = dict[str, dict[str, Any]]
"""Values of settings, by section and key."""


def read_config(arguments: Sequence[str]) -> Config:
    """Read the settings from the command line and the file named by `--job.config_file`.

    Raises:
        UsageError: a section or key is unknown, or a value has the wrong type.
        NotFoundError: the file does not exist.
    """
    values = _explicit_values(arguments)
    sections = {name: cls(**values.get(name, {})) for name, cls in _sections().items()}
    return Config(**sections)


def _explicit_values(arguments: Sequence[str]) -> Values:
    """Return only the values that the command line or the configuration file sets."""
    overrides = _from_command_line(arguments)
    file = overrides.get("job", {}).get("config_file")
    values = _from_file(Path(file)) if file is not None else {}
    for section, keys in overrides.items():
        values.setdefault(section, {}).update(keys)
    return values


def print_requested_help(arguments: Iterable[str], program: str) -> None:
    """If the arguments ask for help, print all settings with defaults and raise `SystemExit`."""
    if not {"-h", "--help"} & {*arguments}:
        return
    import tyro

    if hasattr(signal, "SIGPIPE"):
        # A reader such as `head` may close the pipe early: exit without a traceback.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    tyro.cli(
        Config,
        prog=program,
        description="Train a model, save checkpoints, resume from them.",
        args=["--help"],
        use_underscores=True,
    )


def report(error: HoldfastError) -> int:
    """Print an error in the settings on the first worker of each machine. Return the exit status.

    All workers of a machine find the same error, so one prints it. Another machine has files of its
    own, and may find another error.
    """
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        sys.stderr.write(f"error: {error}\n")
    return error.exit_status


def prepare_start(config: Config, arguments: Sequence[str] = ()) -> None:
    """Print which settings have no effect, and update the installed skills; on rank 0 only.

    TorchTitan's settings for features that do not exist here have no effect. The keys of
    `[checkpoint]` have no effect if `enable` was forgotten.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    file = config.job.config_file
    if file:
        unused = titan.translate(tomllib.loads(Path(file).read_text(encoding="utf-8")))[1]
        if unused:
            sys.stderr.write(
                f"these settings of TorchTitan have no effect here: {', '.join(unused)}\n"
            )
    keys = _explicit_values(arguments).get("checkpoint", {})
    if keys and "enable" not in keys:
        sys.stderr.write(
            "nothing is saved or resumed, since `checkpoint.enable` is off; settings without "
            f"effect: {', '.join(f'checkpoint.{key}' for key in keys)}\n"
            "hint: --checkpoint.enable, or `enable = true` below `[checkpoint]`, turns it on; "
            "--checkpoint.no-enable turns it off without this message\n"
        )
    for line in refresh(os.environ):
        sys.stderr.write(f"{line}\n")


def _sections() -> dict[str, Any]:
    return get_type_hints(Config)


def _keys(section: str) -> dict[str, Any]:
    return get_type_hints(_sections()[section])


def _from_file(path: Path) -> Values:
    values: Values = {}
    for section, table in titan.translate(_read_toml(path))[0].items():
        if section not in _sections():
            raise _unknown(f"`{path}`: section `[{section}]`", section, _sections())
        if not isinstance(table, dict):
            raise UsageError(
                f"`{path}`: `{section}` must be a section, found a value: {table!r}",
                hint=f"write `[{section}]` on a line of its own, its keys below",
            )
        values[section] = {}
        hints = _keys(section)
        for key, value in table.items():
            if key not in hints:
                raise _unknown(f"`{path}`: key `{section}.{key}`", key, hints, section)
            values[section][key] = _from_toml(f"`{path}`: `{section}.{key}`", value, hints[key])
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = sorted(file.name for file in path.parent.glob("*.toml"))
        raise NotFoundError(
            f"`job.config_file`: there is no file `{path}`",
            hint=nearest(path.name, siblings) or "a relative path starts at the current directory",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"`job.config_file`: `{path}` cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"`{path}` is not TOML: {error}", hint="quote text; write true and false in lower case"
        ) from None


def _from_command_line(arguments: Sequence[str]) -> Values:
    values: Values = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UsageError(
                f"`{flag}` on the command line belongs to no setting",
                hint="write a setting as `--section.key value`; `--help` lists all of them",
            )
        name, equals, text = flag[2:].partition("=")
        section, key, negated = _parse_flag(name, flag)
        hint = _keys(section)[key]
        name = f"--{section}.{key}"
        if hint is bool:
            if equals or (rest and not rest[0].startswith("--")):
                raise UsageError(
                    f"`{name}` is a flag and takes no value: {text if equals else rest[0]}",
                    hint=f"`{name}` turns it on, `--{section}.no-{key}` off",
                )
            values.setdefault(section, {})[key] = not negated
            continue
        words = [text] if equals else _take_words(rest, many=is_list(hint))
        if not words:
            raise UsageError(f"`{name}` needs a value: {described(hint)}")
        value = _parsed(f"`{name}`", words, hint)
        earlier = values.setdefault(section, {}).get(key)
        if earlier is not None and is_list(hint) and get_args(hint)[-1] is Ellipsis:
            value = earlier + value
        values[section][key] = value
    return values


def _take_words(rest: list[str], *, many: bool) -> list[str]:
    """Remove the words before the next flag from the front of `rest`, and return them: all of them
    if `many`, else at most one."""
    words: list[str] = []
    while rest and not rest[0].startswith("--") and (many or not words):
        words.append(rest.pop(0))
    return words


def _parse_flag(name: str, flag: str) -> tuple[str, str, bool]:
    """Return the section and key in `name`, a flag without `--` and value, and whether the key has
    the prefix `no-`. `flag`: the flag as error messages show it."""
    section, _, key = name.replace("-", "_").partition(".")
    if section not in _sections():
        flags = [f"{s}.{k}" for s in _sections() for k in _keys(s)]
        suggestion = nearest(f"{section}.{key}", flags) if key else None
        if suggestion is None:
            raise _unknown(f"`{flag}`: section `{section}`", section, _sections())
        raise UsageError(f"`{flag}`: section `{section}` is not known", hint=suggestion)
    hints = _keys(section)
    if key not in hints and key.startswith("no_") and hints.get(key[3:]) is bool:
        return section, key[3:], True
    if key not in hints:
        raise _unknown(f"`{flag}`: key `{section}.{key}`", key, hints, section)
    return section, key, False


def _unknown(what: str, name: str, known: Iterable[str], section: str = "") -> UsageError:
    known = list(known)
    hint = nearest(name, known)
    if section and hint is None:
        others = [s for s in _sections() if name in _keys(s)]
        hint = f"did you mean `{others[0]}.{name}`?" if others else None
    elif section and hint is not None:
        hint = hint.replace("`", f"`{section}.", 1)
    return UsageError(f"{what} is not known", hint=hint or f"known are {', '.join(known)}")


def _from_toml(where: str, value: Any, hint: Any) -> Any:
    """Convert a value in a file to type `hint`. A list may be written as on the command line.
    `where`: name of the setting for error messages."""
    if isinstance(value, str) and is_list(members(hint)[0]):
        return _parsed(where, [value], hint)
    return fitted(where, value, hint)


def _parsed(where: str, words: list[str], hint: Any) -> Any:
    """Parse words of the command line as a value of type `hint`. `where`: name of the setting for
    error messages."""
    if hint is not (types := members(hint))[0]:
        if words[0].lower() == "none" and type(None) in get_args(hint):
            return None
        if len(types) > 1:
            parse = partial(_parsed, where, words)
            return first_fit(where, types, hint, parse, " ".join(words))
        (hint,) = types
    if is_list(hint):
        items = [item.strip() for word in words for item in word.split(",") if item.strip()]
        parsed = [_parsed(where, [item], get_args(hint)[0]) for item in items]
        return of_length(where, parsed, hint)
    (text,) = words
    if hint in (int, float):
        try:
            return fitted(where, hint(text), hint)
        except ValueError:
            raise misfit(where, text, hint) from None
    return fitted(where, text, hint)
