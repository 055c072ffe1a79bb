"""From a TOML file and the command line to a `Config`.

The command line wins over the file, the file over the defaults. Both are read into the same
dictionary of sections, so that a value is checked in one place wherever it was written.
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
from holdfast.errors import NotFoundError, UsageError
from holdfast.skills.startup import refresh
from holdfast.trainer import titan
from holdfast.trainer.config import Config

Values = dict[str, dict[str, Any]]
"""Section to key to value."""


def read_config(arguments: Sequence[str]) -> Config:
    """The settings that `arguments` and the file behind `--job.config_file` stand for.

    Raises:
        UsageError: a section or key that is not known, or a value of the wrong type.
        NotFoundError: there is no such file.
    """
    values = _given(arguments)
    sections = {name: cls(**values.get(name, {})) for name, cls in _sections().items()}
    return Config(**sections)


def _given(arguments: Sequence[str]) -> Values:
    """What the command line and the file say, without the defaults."""
    given = _from_command_line(arguments)
    file = given.get("job", {}).get("config_file")
    values = _from_file(Path(file)) if file is not None else {}
    for section, keys in given.items():
        values.setdefault(section, {}).update(keys)
    return values


def wants_help(arguments: Iterable[str]) -> bool:
    """Whether the reference of all settings is asked for."""
    return any(argument in ("-h", "--help") for argument in arguments)


def print_help(program: str) -> None:
    """Print every setting with its meaning and its default; ends in `SystemExit`."""
    import tyro

    if hasattr(signal, "SIGPIPE"):
        # A reader that has seen enough, such as `head`, is no error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    tyro.cli(
        Config,
        prog=program,
        description="Train a model, save checkpoints, resume from them.",
        args=["--help"],
        use_underscores=True,
    )


def get_ready(config: Config, arguments: Sequence[str] = ()) -> None:
    """Say which settings have no effect: TorchTitan's of what is not here, and those of checkpoints
    where `enable` was forgotten. Bring the user's guides for coding agents up to date, where that
    was agreed to by a first `holdfast skills sync`, and say what has changed. On rank 0 alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    file = config.job.config_file
    idle = titan.ours(tomllib.loads(Path(file).read_text(encoding="utf-8")))[1] if file else []
    if idle:
        sys.stderr.write(
            f"of TorchTitan's settings, these have no effect here: {', '.join(idle)}\n"
        )
    keys = _given(arguments).get("checkpoint", {})
    if keys and "enable" not in keys:
        sys.stderr.write(
            f"nothing is saved or resumed, since `checkpoint.enable` is off: without effect are "
            f"{', '.join(f'checkpoint.{key}' for key in keys)}\n"
            "hint: --checkpoint.enable, or `enable = true` below `[checkpoint]`; "
            "--checkpoint.no-enable where that is wanted\n"
        )
    for line in refresh(os.environ):
        sys.stderr.write(f"{line}\n")


def _sections() -> dict[str, Any]:
    return get_type_hints(Config)


def _keys(section: str) -> dict[str, Any]:
    return get_type_hints(_sections()[section])


# ------------------------------------------------------------------------------------ TOML file


def _from_file(path: Path) -> Values:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(file.name for file in path.parent.glob("*.toml"))
        raise NotFoundError(
            f"`job.config_file`: there is no file `{path}`",
            hint=nearest(path.name, beside) or "a relative path starts at the current directory",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"`job.config_file`: `{path}` cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"`{path}` is not TOML: {error}", hint="text is quoted, true and false are lower-case"
        ) from None
    values: Values = {}
    for section, table in titan.ours(tables)[0].items():
        if section not in _sections():
            raise _unknown(f"`{path}`: section `[{section}]`", section, _sections())
        if not isinstance(table, dict):
            raise UsageError(
                f"`{path}`: `{section}` is a section, found a value: {table!r}",
                hint=f"write `[{section}]` on a line of its own, its keys below",
            )
        values[section] = {}
        hints = _keys(section)
        for key, value in table.items():
            if key not in hints:
                raise _unknown(f"`{path}`: key `{section}.{key}`", key, hints, section)
            values[section][key] = _from_toml(f"`{path}`: `{section}.{key}`", value, hints[key])
    return values


# --------------------------------------------------------------------------------- command line


def _from_command_line(arguments: Sequence[str]) -> Values:
    values: Values = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UsageError(
                f"`{flag}` on the command line belongs to no setting",
                hint="settings are written `--section.key value`; `--help` lists them",
            )
        name, equals, text = flag[2:].partition("=")
        section, key, negated = _known(name, flag)
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
        words = [text] if equals else _words(rest, many=is_list(hint))
        if not words:
            raise UsageError(f"`{name}` needs a value: {described(hint)}")
        value = _parsed(f"`{name}`", words, hint)
        earlier = values.setdefault(section, {}).get(key)
        if earlier is not None and is_list(hint) and get_args(hint)[-1] is Ellipsis:
            value = earlier + value
        values[section][key] = value
    return values


def _words(rest: list[str], *, many: bool) -> list[str]:
    """Take the value, or the values, that follow a flag off the front of `rest`."""
    words: list[str] = []
    while rest and not rest[0].startswith("--") and (many or not words):
        words.append(rest.pop(0))
    return words


def _known(name: str, flag: str) -> tuple[str, str, bool]:
    """Section and key that a flag names, and whether it is the `no-` form."""
    section, _, key = name.replace("-", "_").partition(".")
    if section not in _sections():
        flags = [f"{s}.{k}" for s in _sections() for k in _keys(s)]
        alike = nearest(f"{section}.{key}", flags) if key else None
        if alike is None:
            raise _unknown(f"`{flag}`: section `{section}`", section, _sections())
        raise UsageError(f"`{flag}`: section `{section}` is not known", hint=alike)
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
        elsewhere = [s for s in _sections() if name in _keys(s)]
        hint = f"did you mean `{elsewhere[0]}.{name}`?" if elsewhere else None
    elif section and hint is not None:
        hint = hint.replace("`", f"`{section}.", 1)
    return UsageError(f"{what} is not known", hint=hint or f"known are {', '.join(known)}")


# --------------------------------------------------------------------------------------- values


def _from_toml(where: str, value: Any, hint: Any) -> Any:
    """A value of a file as `hint` has it. A list may be text, as on the command line."""
    if isinstance(value, str) and is_list(members(hint)[0]):
        return _parsed(where, [value], hint)
    return fitted(where, value, hint)


def _parsed(where: str, words: list[str], hint: Any) -> Any:
    """The value that `words` of the command line spell; raises where they spell none."""
    if hint is not (several := members(hint))[0]:
        if words[0].lower() == "none" and type(None) in get_args(hint):
            return None
        if len(several) > 1:
            parse = partial(_parsed, where, words)
            return first_fit(where, several, hint, parse, " ".join(words))
        (hint,) = several
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
