"""Parse command lines, and print lines, tables, JSON and progress."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TextIO, TypeVar, get_type_hints

from holdfast.errors import StorageError, UsageError
from holdfast.spelling import finite, spelled_age, spelled_bytes

T = TypeVar("T")

LINE_S = 30.0
"""Seconds between two progress lines in a log."""

POSITIONAL = {"positional": True}
"""Metadata of a dataclass field that is a positional argument of the command line."""

_STYLES = {"good": "green", "damaged": "bold red", "attempt": "yellow", "resume": "bold"}
"""Style of a table cell, by the text of the cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of every command."""

    debug: bool = False
    """On an error, print the traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonOptions(Options):
    """Options of a command that can print JSON."""

    json: bool = False
    """Print JSON, with all details."""


def parsed(kind: type[T], command: str, arguments: Sequence[str]) -> T:
    """Parse the arguments of a command into its dataclass `kind`.

    If the arguments ask for help or are wrong, print help or an error, and exit the process.
    """
    simple = parsed_without_tyro(kind, arguments)
    if simple is not None:
        return simple
    import tyro

    return tyro.cli(
        with_tyro(kind),
        prog=f"holdfast {command}",
        args=arguments,
        description=inspect.cleandoc(kind.__doc__ or ""),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def with_tyro(kind: type) -> type:
    """Tell tyro which fields of a dataclass are positional arguments. Return `kind`."""
    import tyro

    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    for found in (field for field in fields(kind) if field.metadata == POSITIONAL):
        name, note = found.name.upper(), None
        if str(found.type).startswith("tuple"):
            note = "(one or more)"
        elif found.default is not MISSING:
            name, note = f"[{name}]", f"(default: {found.default})" if found.default else ""
        argument = tyro.conf.arg(metavar=name, help_behavior_hint=note)
        kind.__annotations__[found.name] = Annotated[
            hints[found.name], tyro.conf.Positional, argument
        ]
    return kind


def parsed_without_tyro(kind: type[T], arguments: Sequence[str]) -> T | None:
    """Parse a command line of only positional strings and boolean flags; None for any other.

    This saves the import of tyro, which takes longer than the rest of `holdfast list`. A test
    compares this parser with tyro for every command.
    """
    assert is_dataclass(kind)
    positional = [field for field in fields(kind) if field.metadata == POSITIONAL]
    names = [field.name for field in positional]
    required = [field.name for field in fields(kind) if field.default is MISSING]
    switches = {
        f"--{field.name.replace('_', '-')}": field.name
        for field in fields(kind)
        if field.type == "bool"
    }
    texts = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    if (
        any(field.type != "str" for field in positional)
        or not set(flags) <= switches.keys()
        or len(set(flags)) < len(flags)
        or required != names[: len(required)]
        or not len(required) <= len(texts) <= len(names)
    ):
        return None
    values = dict(zip(names, texts, strict=False))
    made: T = kind(**values, **{switches[flag]: True for flag in flags})
    return made


def command_in(
    program: str, commands: Mapping[str, str], arguments: Sequence[str], about: str, example: str
) -> str | None:
    """Return the command that the arguments begin with. For `--help`, print help and return None.

    `commands` maps each command to its summary. `about` (a description of the program) and
    `example` (a command line) are printed in the help.

    Raises:
        UsageError: the arguments do not begin with a command.
    """
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"usage: {program} COMMAND ...", "", about, ""]
        lines += [f"  {name:<{width}}  {summary}" for name, summary in commands.items()]
        lines += ["", f"Example: {example}", f"Options of a command: {program} COMMAND --help", ""]
        sys.stdout.write("\n".join(lines))
        return None
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        problem = f"has no command `{command}`" if command else "needs a command"
        listed = f"commands: {', '.join(commands)}"
        hint = f"did you mean `{program} {near[0]}`?" if near else listed
        raise UsageError(f"`{program}` {problem}", hint=hint)
    return command


def prepare_streams() -> None:
    """Make stdout and stderr accept any text.

    A character that the encoding lacks is written as an escape. A stream that the shell has closed
    is replaced by the null device.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # The null device gets the file descriptor of the closed stream. Otherwise the next
            # file to be opened would get it, and printed text would go into that file.
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")


def unwritten(error: OSError) -> StorageError:
    """Convert an OSError that ended a command to a StorageError.

    If the output could not be written, discard the rest of it. Otherwise Python would fail again
    when it flushes the output at its exit.
    """
    if error.filename is not None or isinstance(error, FileNotFoundError):
        return StorageError(f"{error}")
    _discard(sys.stdout)
    return StorageError(
        f"cannot write the output: {error.strerror or error}",
        hint="send it to a disk with free space (df -h), or to a terminal",
    )


def _discard(stream: TextIO) -> None:
    """Send all further output of a stream to the null device."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def say_error(line: str) -> None:
    """Print a line to stderr. Do nothing if stderr cannot be written."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)


def say(line: str = "") -> None:
    """Print a line to stdout."""
    sys.stdout.write(f"{line}\n")


def say_json(value: Any) -> None:
    """Print a value to stdout as JSON."""
    json.dump(finite(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: with borders and colours on a terminal, as plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*head)
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  ".join(cells).rstrip())


def spelled_resume(step: int | None) -> str:
    """Return text for a message: which step a resume would load, or that there is none."""
    return f"a resume takes step {step}" if step is not None else "no step to resume from"


def spelled_shape(shape: Sequence[int]) -> str:
    """Format a tensor's shape for messages.

    >>> spelled_shape((2, 3)), spelled_shape(())
    ('2x3', 'scalar')
    """
    return "x".join(map(str, shape)) or "scalar"


@contextmanager
def progress(label: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Context that shows the progress of work on `nbytes` bytes on stderr.

    It yields a function that takes the number of bytes done since its last call. A terminal gets
    a bar with rate and time left. A log gets a line every `LINE_S` seconds, to show that the
    command is not stuck.
    """
    if not nbytes:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield _line_printer(label, nbytes)
        return
    from rich import progress as rich
    from rich.console import Console

    size = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
    columns = (rich.TextColumn(label), rich.BarColumn(), *size)
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=nbytes)
        yield lambda done: bar.advance(task, done)


def _line_printer(label: str, nbytes: int) -> Callable[[int], None]:
    """Return a function that takes the number of bytes done since its last call.

    It prints a line about the progress every `LINE_S` seconds. Any thread may call it.
    """
    done, started = 0, time.monotonic()
    printed, mutex = started, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done, printed
        with mutex:
            done += count
            now = time.monotonic()
            if now - printed < LINE_S:
                return
            printed = now
        left_s = (now - started) * (nbytes - done) / max(done, 1)
        rate = f"{spelled_bytes(int(done / (now - started)))}/s"
        amount = f"{spelled_bytes(done)} of {spelled_bytes(nbytes)}"
        say_error(f"{label}: {amount}, {rate}, {spelled_age(left_s)} left")

    return advance
