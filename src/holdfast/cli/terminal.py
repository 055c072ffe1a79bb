"""What the verbs say: data on stdout, for programs as JSON, for people as lines and tables."""

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
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TextIO, TypeVar

from holdfast.errors import StorageError, UsageError
from holdfast.spelling import finite, spelled_age, spelled_bytes

T = TypeVar("T")

LINE_S = 30.0
"""Between two lines that tell of progress in a log."""

_STYLES = {"good": "green", "damaged": "bold red", "attempt": "yellow", "resume": "bold"}
"""Of cells that say just that."""


def parsed(kind: type[T], verb: str, arguments: Sequence[str]) -> T:
    """The arguments of a verb; ends the process where help is asked for, or they are wrong.

    Verbs import tyro for type checkers alone: it costs more than all else that `list` does.
    """
    plain = plainly(kind, arguments)
    if plain is not None:
        return plain
    import tyro

    return tyro.cli(
        named(kind),
        prog=f"holdfast {verb}",
        args=arguments,
        description=inspect.cleandoc(kind.__doc__ or ""),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def named(kind: type) -> type:
    """A verb's class, with tyro where its annotations look for it: until here they are text."""
    import tyro

    vars(sys.modules[kind.__module__])["tyro"] = tyro
    return kind


def plainly(kind: type[T], arguments: Sequence[str]) -> T | None:
    """What tyro makes of arguments that are places and switches alone, without it; None where there
    is anything else, or anything is wrong."""
    assert is_dataclass(kind)
    of = {one.name: str(one.type) for one in fields(kind)}
    places = [name for name, spelled in of.items() if "tyro.conf.Positional" in spelled]
    switches = {f"--{n.replace('_', '-')}": n for n, spelled in of.items() if spelled == "bool"}
    given = [argument for argument in arguments if not argument.startswith("-")]
    turned = [argument for argument in arguments if argument.startswith("-")]
    needed = [one.name for one in fields(kind) if one.default is MISSING]
    if (
        not all(of[name].startswith("Annotated[str,") for name in places)
        or not {*turned} <= switches.keys()
        or len({*turned}) < len(turned)
        or needed != places[: len(needed)]
        or not len(needed) <= len(given) <= len(places)
    ):
        return None
    values = dict(zip(places, given, strict=False))
    made: T = kind(**values, **{switches[argument]: True for argument in turned})
    return made


def verb_in(
    group: str, verbs: Mapping[str, str], arguments: Sequence[str], what: str, example: str
) -> str | None:
    """The verb that the arguments begin with; None where help was asked for, and is printed.

    Raises:
        UsageError: there is none, or it is not known.
    """
    verb = arguments[0] if arguments else ""
    if verb in ("-h", "--help"):
        width = max(map(len, verbs))
        lines = [f"usage: {group} VERB ...", "", what, ""]
        lines += [f"  {verb:<{width}}  {does}" for verb, does in verbs.items()]
        lines += ["", f"Example: {example}", f"`{group} VERB --help` says more of each.", ""]
        sys.stdout.write("\n".join(lines))
        return None
    if verb not in verbs:
        near = difflib.get_close_matches(verb, verbs, n=1)
        raise UsageError(
            f"`{verb}` is no verb of {group}" if verb else "which verb?",
            hint=f"did you mean `{group} {near[0]}`?" if near else f"verbs: {', '.join(verbs)}",
        )
    return verb


def prepare_streams() -> None:
    """Make both streams of this process take any text: a character that their encoding lacks is
    written as an escape, and a stream that the shell has closed takes everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Takes the closed number too: the next file that is opened must not become stdout.
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace")


def unwritten(error: OSError) -> StorageError:
    """The error on output that could not be written. What is left of the output goes nowhere, so
    that Python does not fail on it again as it ends."""
    if error.filename is not None or isinstance(error, FileNotFoundError):
        return StorageError(f"{error}")
    _drop(sys.stdout)
    return StorageError(
        f"cannot write the output: {error.strerror or error}",
        hint="send it to a disk with free space (df -h), or to a terminal",
    )


def _drop(stream: TextIO) -> None:
    """Have everything that a stream still writes go nowhere."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say_error(line: str) -> None:
    """A line on stderr. Where nobody can read it, the exit status has to do."""
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)


def say(line: str = "") -> None:
    """A line of what was asked for."""
    sys.stdout.write(f"{line}\n")


def say_json(value: Any) -> None:
    """What was asked for, as JSON."""
    json.dump(finite(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: with lines and colour on a terminal, plain columns elsewhere."""
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


@contextmanager
def progress(what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Tell it how many bytes more are done: on a terminal stderr has a bar with rate and time left,
    elsewhere a line every half minute, so that a log shows that something goes on."""
    if not nbytes:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield _Lines(what, nbytes).advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    rate = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn(what), BarColumn(), *rate)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=nbytes)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Progress as lines of a log. Told from any thread."""

    def __init__(self, what: str, nbytes: int) -> None:
        self._what, self._nbytes, self._done = what, nbytes, 0
        self._started = self._said = time.monotonic()
        self._mutex = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._mutex:
            self._done += nbytes
            now = time.monotonic()
            if now - self._said < LINE_S:
                return
            self._said, spent = now, now - self._started
        left = spent * (self._nbytes - self._done) / max(self._done, 1)
        done = f"{spelled_bytes(self._done)} of {spelled_bytes(self._nbytes)}"
        rate = f"{spelled_bytes(int(self._done / spent))}/s"
        say_error(f"{self._what}: {done}, {rate}, {spelled_age(left)} left")
