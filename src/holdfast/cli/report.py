"""`holdfast report`: a page of HTML about a run and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from holdfast.cli.terminal import Options, parsed, say
from holdfast.dashboard.history import history_of
from holdfast.dashboard.page import page
from holdfast.errors import StorageError

if TYPE_CHECKING:
    import tyro


@dataclass(frozen=True, slots=True)
class ReportArguments(Options):
    """Write a page of HTML about a run: its steps over time, how long each save delayed training,
    throughput, loss, sizes, bytes written by each rank, and every checkpoint with its problems.
    The page needs no network. Reads indexes, and the metrics.jsonl beside the folder.

    Example: holdfast report outputs/checkpoint
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Path or URL of a folder of checkpoints."""

    out: str = "report.html"
    """File to write. An existing one is replaced."""


def run(arguments: Sequence[str]) -> int:
    """Write the page, and print its path; returns the exit status."""
    options = parsed(ReportArguments, "report", arguments)
    text = page(history_of(options.folder), datetime.now(UTC))
    target = Path(options.out)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(text.encode(errors="replace"))
        part.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write `{target}`: {error.strerror}") from error
    say(str(target))
    return 0
