"""`holdfast convert`: convert a checkpoint to DCP, a Hugging Face folder or a `.pt` file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from holdfast.cli.terminal import (
    POSITIONAL,
    JsonOptions,
    parsed,
    progress,
    say,
    say_error,
    say_json,
)
from holdfast.convert.convert import convert
from holdfast.convert.hub import again_hint, open_repository, upload
from holdfast.convert.plan import ConvertOptions, Float, plan
from holdfast.convert.target_format import TargetFormat, target_format
from holdfast.errors import UsageError
from holdfast.spelling import rate, spelled_bytes
from holdfast.storage.opening import is_url, without_scheme

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class ConvertArguments(JsonOptions):
    """Convert a checkpoint (of Holdfast, of stock torch.distributed.checkpoint, a Hugging Face
    folder or a .pt file) into another format, tensor by tensor, in bounded memory. TARGET appears
    once it is complete.

    Example: holdfast convert meta-llama/Llama-3.1-8B outputs/checkpoint/step-0
    """

    source: str = field(metadata=POSITIONAL)
    """Checkpoint: a path, a URL, or the name of a repository on the Hugging Face hub."""

    target: str = field(metadata=POSITIONAL)
    """Folder or .pt file to write."""

    to: TargetFormat | None = None
    """Format of TARGET. dcp: a checkpoint as a save writes it; hf: a Hugging Face folder; torch: a
    .pt file. Default: torch if TARGET ends in .pt, else dcp."""

    hf_assets: str | None = None
    """Folder, or name on the hub, with the config.json, tokenizer and so on of an export."""

    dtype: Float | None = None
    """Dtype of the model's floating-point tensors. Default: unchanged."""

    max_shard_size: str = "5GB"
    """Largest size of each file of an export."""

    model_name: str | None = None
    """Family: llama3, qwen3, deepseek_v3, gpt_oss, ... Must agree with config.json."""

    model_flavor: str | None = None
    """Size, in TorchTitan's terms: 8B, 30B-A3B, 20b, ... Must agree with config.json; needed where
    there is none."""

    model_only: bool = False
    """Leave out everything but the model: optimizer, schedule and so on."""

    names: Literal["meta", "titan"] | None = None
    """Tensor names of a dcp or torch target: meta for Meta's, which TorchTitan used up to 0.2;
    titan for the names of TorchTitan from 0.3 on. Default: as in SOURCE; Meta's for Hugging Face
    models."""

    skip: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Pattern of tensors to leave out, such as 'vision_tower.*'. May be repeated."""

    rename: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Rule THEIRS=OURS for the beginning of the model's tensor names, such as 'module=' or
    'encoder.{}.attn=layers.{}.attention'. May be repeated; the first rule that matches counts."""

    adapter_config: str | None = None
    """For --to hf from a checkpoint with PEFT adapters: their adapter_config.json. TARGET becomes a
    folder of PEFT."""

    merge: bool = False
    """For --to hf from a checkpoint or folder with PEFT adapters: add them to their base, which is
    in SOURCE or in --hf-assets. TARGET becomes a whole model."""

    push_to_hub: str | None = None
    """For --to hf: repository ORG/NAME on the Hugging Face hub, to which TARGET is uploaded once it
    is complete, with a model card. A new repository is private."""

    overwrite: bool = False
    """Replace an existing TARGET."""

    def convert_options(self) -> ConvertOptions:
        """Check that the options fit each other, and return them as a `ConvertOptions`."""
        to = target_format(self.source, self.target, self.to)
        if self.push_to_hub is not None and to != "hf":
            raise UsageError("`--push-to-hub` uploads a Hugging Face folder, and needs `--to hf`")
        if self.push_to_hub is not None and is_url(without_scheme(self.target)):
            raise UsageError(
                f"`--push-to-hub` uploads a local folder, and `{self.target}` is a URL",
                hint="pass a local folder as TARGET",
            )
        if self.names is not None and to == "hf":
            raise UsageError(
                "`--names` is for targets with native names: an export has those of Hugging Face",
                hint="leave out `--names`, or `--to dcp`",
            )
        return ConvertOptions(
            to=to,
            hf_assets=self.hf_assets,
            dtype=self.dtype,
            max_shard_bytes=nbytes_of(self.max_shard_size),
            model_name=self.model_name,
            model_flavor=self.model_flavor,
            model_only=self.model_only,
            names=self.names,
            skip=self.skip,
            renames=self.rename,
            adapter_config=self.adapter_config,
            merge=self.merge,
            push_to_hub=self.push_to_hub,
            overwrite=self.overwrite,
        )


def run(arguments: Sequence[str]) -> int:
    """Run `holdfast convert`: convert, and print size and rate. Return the exit status."""
    options = parsed(ConvertArguments, "convert", arguments)
    planned = plan(options.source, options.convert_options())
    if options.push_to_hub is not None:
        open_repository(options.push_to_hub)
    try:
        with progress(options.target, planned.nbytes) as advance:
            result = convert(planned, options.target, advance)
    except KeyboardInterrupt:
        say_error("interrupted: run the same command again to continue")
        raise
    commit = _uploaded(result.where, options.push_to_hub)
    if options.json:
        sizes = {"nbytes": result.nbytes, "kept_bytes": result.kept_bytes}
        facts = {"seconds": round(result.seconds, 3), "tensors": result.num_tensors}
        pushed = {} if commit is None else {"commit": commit}
        say_json(
            {
                "target": result.where,
                "files_at": result.files_at,
                **sizes,
                **facts,
                **pushed,
                "notes": planned.notes,
            }
        )
        return 0
    for note in planned.notes:
        say(f"note: {note}")
    if result.kept_bytes:
        kept = spelled_bytes(result.kept_bytes)
        say(f"note: an interrupted conversion had written {kept} of it already")
    if result.files_at != result.where:
        say(f"note: other programs find the files in {result.files_at}")
    written = rate(result.nbytes, result.seconds)
    say(f"{result.where}: {result.num_tensors} tensors, {written}")
    if commit is not None:
        say(f"uploaded: {commit}")
    return 0


def _uploaded(folder: str, name: str | None) -> str | None:
    """Upload an export to the repository `name` on the Hugging Face hub.

    Return the URL of the commit. If `name` is None, upload nothing and return None.
    """
    if name is None:
        return None
    try:
        return upload(folder, name)
    except KeyboardInterrupt:
        say_error(f"interrupted: {again_hint(folder, name)}")
        raise


def nbytes_of(text: str) -> int:
    """Convert a size such as `5GB` to bytes.

    >>> nbytes_of("5GB"), nbytes_of("1.5 MiB")
    (5000000000, 1572864)
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"`--max-shard-size` must be a size such as 5GB or 500MB, found: {text}")
    return int(float(match[1]) * unit)
