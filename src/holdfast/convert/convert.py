"""Conversion of any checkpoint to one of Holdfast, a Hugging Face folder or a `.pt` file."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

from holdfast.catalog.hf_folder import ADAPTER, ADAPTER_CONFIG
from holdfast.catalog.steady import UNREADABLE
from holdfast.convert.adapter import encoded_config
from holdfast.convert.hub import with_card
from holdfast.convert.plan import ConvertPlan
from holdfast.convert.stream import Advance
from holdfast.convert.target import (
    ConvertTarget,
    Values,
    check_number,
    open_target,
    write_checkpoint,
    write_hf,
    write_torch_file,
)
from holdfast.errors import NotFoundError
from holdfast.format.manifest import Kind, Manifest, Path
from holdfast.format.names import step_of
from holdfast.format.structure import Node
from holdfast.hf.assets import files_beside, stem_of
from holdfast.hf.shards import lay_out_single, shard
from holdfast.release import installed_version


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """Result of a conversion."""

    where: str
    """Path of the target."""

    files_at: str
    """Path or URL below which other programs find the files of the target."""

    nbytes: int
    """Bytes of the target; for an export, bytes of its weights."""

    kept_bytes: int
    """Bytes of the target that an earlier, killed conversion had already written."""

    seconds: float
    num_tensors: int


def convert(planned: ConvertPlan, target: str, advance: Advance = lambda _: None) -> ConvertResult:
    """Carry out a planned conversion, to the path `target`: see `convert_to`. `advance`: called
    with the number of bytes written since its last call."""
    # Encode values before a folder is created, since a value may be impossible to convert.
    values = values_of(planned)
    if planned.options.to == "dcp":
        check_number(target, _kind(planned), planned.opened.checkpoint.manifest.step)
    paths = planned.opened.checkpoint.where, planned.assets
    sources = [path for path in paths if path is not None]
    overwrite, file = planned.options.overwrite, planned.options.to == "torch"
    opened = open_target(target, overwrite=overwrite, sources=sources, file=file)
    return convert_to(opened, planned, values, advance)


def convert_to(
    target: ConvertTarget, planned: ConvertPlan, values: Values, advance: Advance = lambda _: None
) -> ConvertResult:
    """Write a planned conversion and its values to a target, which appears only when complete.

    Continues an earlier conversion to the same target that was killed. Uses memory for a few blocks
    of 32 MB, whatever the size of the model.

    Raises:
        ExistsError: the target exists, or was created meanwhile.
        StorageError: no space or no permission; nothing is left behind.
        DamagedError: the stored bytes of the source are not the ones that were written.
        NotFoundError: another process replaced or removed the source meanwhile.
    """
    started = time.perf_counter()
    try:
        nbytes, files_at = _write(target, planned, values, advance)
    except UNREADABLE as error:
        if not planned.opened.is_gone:
            raise
        raise NotFoundError(
            f"`{planned.opened.checkpoint.where}` was replaced or removed during the conversion",
            hint="run the command again",
        ) from error
    seconds = time.perf_counter() - started
    kept_bytes = 0 if target.files is None else target.files.kept_bytes
    return ConvertResult(target.where, files_at, nbytes, kept_bytes, seconds, len(planned.outputs))


def _write(
    target: ConvertTarget, planned: ConvertPlan, values: Values, advance: Advance
) -> tuple[int, str]:
    """Write the target. Returns its size in bytes; for an export, the size of the weights. Also
    returns the path or URL below which other programs find its files."""
    outputs, options = planned.outputs, planned.options
    if options.to == "hf":
        infos = {name: (output.dtype, output.shape) for name, output in outputs.items()}
        if planned.adapter is not None:
            layout = lay_out_single(infos, ADAPTER)
            contents = iter([(ADAPTER_CONFIG, encoded_config(planned.adapter))])
        else:
            assert planned.config is not None, "an export has a configuration"
            assets = planned.assets or (planned.opened.where if planned.opened.has_config else None)
            layout = shard(infos, options.max_shard_bytes, stem=stem_of(planned.config))
            contents = files_beside(planned.config, assets, layout.dtype, layout.index)
        if options.push_to_hub is not None:
            contents = with_card(contents, planned, layout.dtype)
        return write_hf(target, outputs, layout, contents, advance)
    if options.to == "torch":
        return write_torch_file(target, outputs, values, advance), target.where
    facts, structure = _facts(target, planned), _structure(planned, values)
    nbytes = write_checkpoint(target, outputs, values, facts, advance, structure=structure)
    return nbytes, target.where


def _facts(target: ConvertTarget, planned: ConvertPlan) -> Manifest:
    """Return the manifest of the checkpoint to write, without entries and files. A step number in
    the target's name overrides the step of the source."""
    manifest = planned.opened.checkpoint.manifest
    step = step_of(target.name)
    components = manifest.components
    return Manifest(
        tensors={},
        values={},
        step=manifest.step if step is None else step,
        kind=_kind(planned),
        layout={"world_size": 1},
        versions={"holdfast": installed_version(), "python": platform.python_version()},
        model=planned.config or manifest.model,
        components=() if components is not None and planned.options.model_only else components,
    )


def _kind(planned: ConvertPlan) -> Kind:
    """Return the kind of the checkpoint to write: `full`, or `model` for the model alone."""
    if not planned.complete:
        return "model"
    opened = planned.opened
    return opened.checkpoint.manifest.kind or ("full" if opened.others else "model")


def _structure(planned: ConvertPlan, values: Values) -> dict[Path, Node] | None:
    """Return the source's structure; None if it has none. Leave out the nodes of dicts and lists
    from which the conversion leaves out an entry."""
    manifest = planned.opened.checkpoint.manifest
    if manifest.structure is None:
        return None
    kept = {output.path for output in planned.outputs.values()}
    kept |= {path for path, _ in values.values()}
    entries = [entry.path for entry in manifest.tensors.values()]
    entries += [entry.path for entry in manifest.values.values()]
    left_out = [path for path in entries if path not in kept]
    return {
        path: node
        for path, node in manifest.structure.items()
        if not any(entry[: len(path)] == path for entry in left_out)
    }


def values_of(planned: ConvertPlan) -> Values:
    """Return the path and bytes of each value of the source, in the form that the target needs;
    empty if the target gets no values."""
    opened, options = planned.opened, planned.options
    if options.to == "hf" or options.model_only or not opened.checkpoint.manifest.values:
        return {}
    from holdfast.convert.values import encoded_values

    return encoded_values(opened.checkpoint, pickled=options.to == "torch")
