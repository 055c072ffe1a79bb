"""`holdfast report`: a run and its checkpoints on one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from holdfast.catalog.open_any import check_folder
from holdfast.catalog.paths import open_for_reading
from holdfast.cli.terminal import parsed, say
from holdfast.dashboard.history import history_of
from holdfast.dashboard.page import page
from holdfast.errors import StorageError

if TYPE_CHECKING:
    import tyro


@dataclass(frozen=True, slots=True)
class ReportArguments:
    """Write one page of HTML on a run: its steps over time, how long each save held it up,
    throughput, loss, sizes, what each rank wrote, and every checkpoint with what is wrong with it.
    The page needs no network. Reads indexes, and the metrics.jsonl beside the folder.

    Example: holdfast report outputs/checkpoint
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of steps, or its URL."""

    out: str = "report.html"
    """File to write; one that is there is replaced."""

    debug: bool = False
    """On an error, print where it came from."""


def run(arguments: Sequence[str]) -> int:
    """Write the page, say where it is; the exit status."""
    asked = parsed(ReportArguments, "report", arguments)
    check_folder(*open_for_reading(asked.folder))
    text = page(history_of(asked.folder), datetime.now(UTC))
    target = Path(asked.out)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(text.encode(errors="replace"))
        part.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write `{target}`: {error.strerror}") from error
    say(str(target))
    return 0
