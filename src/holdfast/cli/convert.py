"""`holdfast convert`: any checkpoint to a step, a Hugging Face folder or a .pt file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from holdfast.cli.terminal import parsed, progress, say, say_error, say_json
from holdfast.convert.convert import ConvertResult, convert
from holdfast.convert.plan import ConvertOptions, Float, plan
from holdfast.convert.target_format import TargetFormat, target_format
from holdfast.errors import UsageError
from holdfast.spelling import spelled_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class ConvertArguments:
    """Convert a checkpoint (a step of Holdfast, a folder of stock torch.distributed.checkpoint or
    of Hugging Face, a .pt file) into another format, tensor by tensor, in bounded memory. TARGET is
    absent until it is whole.

    Example: holdfast convert meta-llama/Llama-3.1-8B outputs/checkpoint/step-0
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint: a path, a URL, or the name of a repository on the Hugging Face hub."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Folder, or .pt file, to write."""

    to: TargetFormat | None = None
    """dcp: a step, as a save writes it; hf: a Hugging Face folder; torch: a .pt file. By default
    torch where TARGET ends in .pt, else dcp."""

    hf_assets: str | None = None
    """Folder (or hub name) with the config.json, tokenizer and so on of an export."""

    dtype: Float | None = None
    """Of the model's floating-point tensors; by default as they are."""

    max_shard_size: str = "5GB"
    """Of one file of an export."""

    model_name: str | None = None
    """Family: llama3, qwen3, deepseek_v3, gpt_oss, ... Checked against config.json."""

    model_flavor: str | None = None
    """Size, as TorchTitan calls it: 8B, 30B-A3B, 20b, ... Checked against config.json, or in its
    place."""

    model_only: bool = False
    """Leave out optimizer, schedule and everything else that is not the model's."""

    names: Literal["meta", "titan"] | None = None
    """What native tensors are called: by Meta and TorchTitan up to 0.2, or by TorchTitan from 0.3
    on. By default as in SOURCE, and Meta's from the hub."""

    skip: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Pattern of tensors to leave out, such as 'vision_tower.*'; may be given several times."""

    overwrite: bool = False
    """Replace what is at TARGET."""

    json: bool = False
    """Print JSON."""

    debug: bool = False
    """On an error, print where it came from."""

    def options(self) -> ConvertOptions:
        """What the conversion is told.

        Raises:
            UsageError: no target of its format.
        """
        return ConvertOptions(
            to=target_format(self.source, self.target, self.to),
            hf_assets=self.hf_assets,
            dtype=self.dtype,
            max_shard_bytes=nbytes_of(self.max_shard_size),
            model_name=self.model_name,
            model_flavor=self.model_flavor,
            model_only=self.model_only,
            names=self.names,
            skip=self.skip,
            overwrite=self.overwrite,
        )


def run(arguments: Sequence[str]) -> int:
    """Convert, and say how much and how fast; the exit status."""
    asked = parsed(ConvertArguments, "convert", arguments)
    done, notes = converted(asked)
    if asked.json:
        seconds = round(done.seconds, 3)
        say_json(
            {
                "target": done.where,
                "nbytes": done.nbytes,
                "kept_bytes": done.kept_bytes,
                "seconds": seconds,
                "tensors": done.num_tensors,
                "notes": notes,
            }
        )
        return 0
    for note in notes:
        say(f"note: {note}")
    if done.kept_bytes:
        kept = spelled_bytes(done.kept_bytes)
        say(f"note: {kept} were there already, from a conversion that was interrupted")
    rate = spelled_bytes(round(done.nbytes / max(done.seconds, 1e-9)))
    written = f"{spelled_bytes(done.nbytes)} in {done.seconds:.1f} s ({rate}/s)"
    say(f"{done.where}: {done.num_tensors} tensors, {written}")
    return 0


def converted(asked: ConvertArguments) -> tuple[ConvertResult, Sequence[str]]:
    """The conversion, done, with a bar on a terminal; and its notes."""
    planned = plan(asked.source, asked.options())
    try:
        with progress(asked.target, planned.nbytes) as advance:
            return convert(planned, asked.target, advance), planned.notes
    except KeyboardInterrupt:
        say_error("interrupted: the same command goes on from here")
        raise


def nbytes_of(text: str) -> int:
    """A size as people write it.

    >>> nbytes_of("5GB"), nbytes_of("1.5 MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"`--max-shard-size` is a size such as 5GB or 500MB, found: {text}")
    return int(float(match[1]) * unit)
