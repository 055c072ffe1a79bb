"""`holdfast report`: a page of HTML about a run and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from holdfast.catalog.open_any import check_exists, check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.cli.terminal import POSITIONAL, Options, parsed, say
from holdfast.dashboard.history import HistoryReader
from holdfast.dashboard.page import GENERATOR, page
from holdfast.errors import ExistsError, StorageError
from holdfast.storage.opening import local_path

HEAD_BYTES = 4096
"""Number of bytes at the start of a file that are searched for `GENERATOR`."""


@dataclass(frozen=True, slots=True)
class ReportArguments(Options):
    """Write a page of HTML about a run: its steps over time, how long each save delayed training,
    throughput, loss, sizes, bytes written by each rank, and every checkpoint with its problems.
    The page needs no network. Reads indexes, and the metrics.jsonl beside the folder.

    Example: holdfast report outputs/checkpoint
    """

    folder: str = field(metadata=POSITIONAL)
    """Path or URL of a folder of checkpoints."""

    out: str = "report.html"
    """File to write. An earlier report is replaced; any other file is refused."""


def check_replaceable(target: Path) -> None:
    """Raise an ExistsError if `target`, the file to write, exists and is not an earlier report."""
    try:
        with target.open("rb") as file:
            is_report = GENERATOR.encode() in file.read(HEAD_BYTES)
    except OSError:
        # If there is no such file, there is nothing to protect. The write reports other errors.
        return
    if not is_report:
        raise ExistsError(
            f"`{target}` exists, and is not a page of `holdfast report`",
            hint="choose another file for `--out`, or move it away",
        )


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast report`: write the page, and print its path. Return the exit status."""
    options = parsed(ReportArguments, "report", arguments)
    local_path(options.out)
    target = Path(options.out)
    check_replaceable(target)
    store, name = open_for_reading(options.folder)
    check_exists(store, name)
    check_folder(store, name)
    text = page(HistoryReader(options.folder).read(), datetime.now(UTC))
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(text.encode(errors="replace"))
        part.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write `{target}`: {error.strerror}") from error
    say(str(target))
    return 0
