"""`holdfast verify --as-export`: check that other programs can load a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.cli.terminal import say
from holdfast.errors import MismatchError, NotFoundError, UsageError
from holdfast.spelling import counted


@dataclass(frozen=True, slots=True)
class CheckedExport:
    """Result of checking one Hugging Face folder."""

    wrong: tuple[str, ...]
    """Reasons why a loader would fail, or would load a model that computes something else."""

    notes: tuple[str, ...]
    logits: str | None
    """Text on how much the logits differ from those of another model; None if not compared."""


def checked_export(path: str, against: str | None) -> CheckedExport:
    """Check the Hugging Face folder at `path`.

    If there is no mistake, and `against` is the path of another folder, compare the logits of the
    two models too.
    """
    from holdfast.convert.export_check import check_export

    if against is not None and not Path(against).exists():
        raise NotFoundError(f"nothing at `{against}`", hint="`--against` takes a local folder")
    if against is not None and not Path(against, "config.json").is_file():
        raise UsageError(
            f"`--against {against}` is no Hugging Face folder: it has no `config.json`",
            hint=f"holdfast convert {against} original --to hf; then `--against original`",
        )

    report = check_export(path)
    if against is None or report.wrong:
        return CheckedExport(report.wrong, report.notes, None)
    from holdfast.convert.export_logits import compare_logits

    try:
        found = compare_logits(path, against)
    except MismatchError as error:
        return CheckedExport((error.what,), report.notes, None)
    logits = (
        f"largest difference {found.difference:.1e} of the largest logit, KL divergence "
        f"{found.divergence:.1e} per token"
    )
    wrong = () if found.good else (f"the logits differ from those of `{against}`: {logits}",)
    return CheckedExport(wrong, report.notes, logits)


def say_export(export: CheckedExport, path: str) -> None:
    """Print the result of checking the Hugging Face folder at `path`."""
    if not export.wrong:
        say(f"{path}: loaders find everything in place")
    for line in export.wrong:
        say(f"  {line}")
    if export.logits is not None:
        say(f"  logits: {export.logits}")
    for note in export.notes:
        say(f"  note: {note}")


def raise_if_wrong(export: CheckedExport, path: str) -> None:
    """Raise an error if the check has found mistakes.

    Raises:
        MismatchError: `export.wrong` is not empty.
    """
    if not export.wrong:
        return
    raise MismatchError(
        f"`{path}` has {counted(len(export.wrong), 'mistake')}",
        hint="`holdfast convert SOURCE FOLDER --to hf --hf-assets ASSETS` writes a new export",
    )
