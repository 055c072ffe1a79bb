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
from holdfast.dashboard.page import GENERATOR, page
from holdfast.errors import ExistsError, StorageError
from holdfast.storage.opening import local_path

if TYPE_CHECKING:
    import tyro


HEAD_BYTES = 4096
"""Of a file, where its generator is named."""


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
    """File to write; an earlier report is replaced, no other file."""

    debug: bool = False
    """On an error, print where it came from."""


def check_own(target: Path) -> None:
    """Refuse to replace a file that is no page of an earlier report.

    Raises:
        ExistsError: it is somebody's.
    """
    try:
        with target.open("rb") as file:
            own = GENERATOR.encode() in file.read(HEAD_BYTES)
    except OSError:
        return  # Nothing is there; or what is there cannot be replaced, which the write says.
    if not own:
        raise ExistsError(
            f"`{target}` is there, and is no page of `holdfast report`",
            hint="choose another file for `--out`, or move it away",
        )


def run(arguments: Sequence[str]) -> int:
    """Write the page, say where it is; the exit status."""
    asked = parsed(ReportArguments, "report", arguments)
    local_path(asked.out)
    target = Path(asked.out)
    check_own(target)
    check_folder(*open_for_reading(asked.folder))
    text = page(history_of(asked.folder), datetime.now(UTC))
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(text.encode(errors="replace"))
        part.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write `{target}`: {error.strerror}") from error
    say(str(target))
    return 0
