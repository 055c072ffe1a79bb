"""From a TOML file and the command line to a `Config`.

The command line wins over the file, the file over the defaults. Both are read into the same
dictionary of sections, so that a value is checked in one place wherever it was written.
"""

from __future__ import annotations

import os
import signal
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from holdfast.errors import HoldfastError, NotFoundError, UsageError
from holdfast.skills.startup import refresh
from holdfast.trainer import titan
from holdfast.trainer.config import Config, nearest

Values = dict[str, dict[str, Any]]
"""Section to key to value."""


def read_config(arguments: Sequence[str]) -> Config:
    """The settings that `arguments` and the file behind `--job.config_file` stand for.

    Raises:
        UsageError: a section or key that is not known, or a value of the wrong type.
        NotFoundError: there is no such file.
    """
    given = _from_command_line(arguments)
    file = given.get("job", {}).get("config_file")
    values = _from_file(Path(file)) if file is not None else {}
    for section, keys in given.items():
        values.setdefault(section, {}).update(keys)
    sections = {name: cls(**values.get(name, {})) for name, cls in _sections().items()}
    return Config(**sections)


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


def get_ready(config: Config) -> None:
    """Say which of TorchTitan's settings in the file have no effect here. Bring the user's guides
    for coding agents up to date, where that was agreed to by a first `holdfast skills sync`, and
    say what has changed. On rank 0 alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    file = config.job.config_file
    idle = titan.ours(tomllib.loads(Path(file).read_text(encoding="utf-8")))[1] if file else []
    if idle:
        sys.stderr.write(
            f"of TorchTitan's settings, these have no effect here: {', '.join(idle)}\n"
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
            values[section][key] = _fitted(f"`{path}`: `{section}.{key}`", value, hints[key])
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
        words = [text] if equals else _words(rest, many=_is_list(hint))
        if not words:
            raise UsageError(f"`{name}` needs a value: {_described(hint)}")
        value = _parsed(f"`{name}`", words, hint)
        earlier = values.setdefault(section, {}).get(key)
        if earlier is not None and _is_list(hint) and get_args(hint)[-1] is Ellipsis:
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


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _members(hint: Any) -> tuple[Any, ...]:
    """What an optional hint allows beside None; the hint itself where it is not optional."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def _described(hint: Any) -> str:
    if len(members := _members(hint)) > 1:
        return ", or ".join(map(_described, members))
    (hint,) = members
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if _is_list(hint):
        item, *others = get_args(hint)
        if others[-1] is Ellipsis:
            return f"a list, each {_described(item)}"
        return f"{len(others) + 1} values, each {_described(item)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _fitted(where: str, value: Any, hint: Any) -> Any:
    """A value from TOML as `hint` has it; raises where its type is another."""
    if len(members := _members(hint)) > 1:
        return _first_fit(where, members, hint, lambda member: _fitted(where, value, member), value)
    (hint,) = members
    if _is_list(hint):
        if isinstance(value, str):
            return _parsed(where, [value], hint)
        if not isinstance(value, list):
            raise _misfit(where, value, hint)
        return _of_length(where, [_fitted(where, v, get_args(hint)[0]) for v in value], hint)
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is Literal:
        fits = isinstance(value, str) and value in get_args(hint)
    else:
        # Not `isinstance`, to which True is a whole number.
        fits = type(value) is hint
    if not fits:
        raise _misfit(where, value, hint)
    return value


def _parsed(where: str, words: list[str], hint: Any) -> Any:
    """The value that `words` of the command line spell; raises where they spell none."""
    if hint is not (members := _members(hint))[0]:
        if words[0].lower() == "none" and type(None) in get_args(hint):
            return None
        if len(members) > 1:
            parse = partial(_parsed, where, words)
            return _first_fit(where, members, hint, parse, " ".join(words))
        (hint,) = members
    if _is_list(hint):
        items = [item.strip() for word in words for item in word.split(",") if item.strip()]
        parsed = [_parsed(where, [item], get_args(hint)[0]) for item in items]
        return _of_length(where, parsed, hint)
    (text,) = words
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise _misfit(where, text, hint) from None
    return _fitted(where, text, hint)


def _first_fit(
    where: str, members: Sequence[Any], hint: Any, read: Callable[[Any], Any], value: object
) -> Any:
    """The value as the first of a union's members that it fits."""
    for member in members:
        with suppress(UsageError):
            return read(member)
    raise _misfit(where, value, hint)


def _of_length(where: str, values: list[Any], hint: Any) -> tuple[Any, ...]:
    members = get_args(hint)
    if members[-1] is not Ellipsis and len(values) != len(members):
        raise _misfit(where, values, hint)
    return tuple(values)


def _misfit(where: str, value: object, hint: Any) -> HoldfastError:
    literals = (member for member in _members(hint) if get_origin(member) is Literal)
    choices = [choice for literal in literals for choice in get_args(literal)]
    return UsageError(
        f"{where} is {_described(hint)}, found: {value!r}",
        hint=nearest(str(value), [str(choice) for choice in choices]),
    )
