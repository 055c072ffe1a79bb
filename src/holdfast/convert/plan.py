"""Planning of a conversion: every tensor of the target, checked before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.catalog.hf_folder import CONFIG, of_language_model
from holdfast.convert.sizes import config_of_model
from holdfast.convert.source import ConvertSource, fetched, open_source
from holdfast.convert.stream import Output, Outputs, dtype_for
from holdfast.convert.target_format import TargetFormat
from holdfast.errors import UsageError
from holdfast.format.manifest import Path
from holdfast.format.names import MANIFEST
from holdfast.hf.adapter import adapter_mapping
from holdfast.hf.check import HINT, check_fit, skipped
from holdfast.hf.dialects import balances, renamed
from holdfast.hf.families import family_of
from holdfast.hf.family import Config, fused_experts, mapping_of
from holdfast.hf.shards import SHARD_BYTES
from holdfast.tensors.lazy import Mapped, Renamed, Tensors, Zeros, only
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.relation import SideName
from holdfast.tensors.renames import spelled, suggested

Float = Literal["float32", "bfloat16", "float16"]

_FIT_HINT = f"{HINT}; `--skip 'PATTERN'` leaves out unwanted tensors"


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Options of a conversion."""

    to: TargetFormat

    hf_assets: str | None = None
    """Folder, or repository on the hub, from which an export copies configuration and tokenizer."""

    dtype: Float | None = None
    """Dtype of the model's floating-point tensors; None: the stored dtype."""

    max_shard_bytes: int = SHARD_BYTES
    """Most bytes in one file of an export."""

    model_name: str | None = None
    """TorchTitan's name of the family, checked against `config.json`."""

    model_flavor: str | None = None
    """TorchTitan's name of the size, checked against `config.json`, or used in its place."""

    model_only: bool = False
    """Whether to leave out everything but the model."""

    names: Literal["meta", "titan"] | None = None
    """Dialect of native names; None: as in the source, and Meta's for a Hugging Face folder."""

    skip: tuple[str, ...] = ()
    """Patterns of tensors to leave out."""

    renames: tuple[str, ...] = ()
    """Rules `theirs=ours` for the names of the model's tensors."""

    overwrite: bool = False
    """Whether to replace an existing target."""


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """A conversion, before anything is written."""

    opened: ConvertSource
    options: ConvertOptions
    outputs: Outputs
    config: Config | None
    """Complete configuration of the model; None: unknown, and not needed."""

    complete: bool
    """Whether the target gets the whole source, not only the model."""

    assets: str | None
    """Path of the folder whose files an export copies."""

    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements to write."""
        return sum(output.nbytes for output in self.outputs.values() if not output.same_as)


def plan(source: str, options: ConvertOptions) -> ConvertPlan:
    """Plan a conversion, with all checks that need no data."""
    opened = open_source(source, options.renames)
    assets = None if options.hf_assets is None else fetched(options.hf_assets, assets_only=True)
    model: Tensors = opened.model
    notes = list(opened.notes)
    if options.skip:
        left_out = skipped(model.infos, options.skip)
        model = only(model, [name for name in model.infos if name not in left_out])
        notes.append(f"left out {len(left_out)} tensors that match `--skip`")
    config, config_from = config_of_model(
        opened, model, assets, options.model_name, options.model_flavor
    )
    if config is None and options.to == "hf" and opened.checkpoint.manifest.model:
        config, config_from = (
            dict(opened.checkpoint.manifest.model),
            f"`{opened.checkpoint.where}/{MANIFEST}`",
        )
    hf = opened.checkpoint.hf
    if hf is not None and hf.adapter is not None:
        outputs, note = _adapter(opened, hf.adapter, model, (config, config_from), options)
        return ConvertPlan(opened, options, outputs, None, False, None, (*notes, note))
    both = None
    if config is not None and opened.dialect is not None:
        both = _both_dialects(opened, model, of_language_model(config), config_from)
        notes += both.notes
    to_hf, complete = options.to == "hf", False
    if both is not None and to_hf:
        outputs = _outputs(both.hf, options)
    elif both is not None and opened.dialect == "hf":
        outputs = _from_hf(both, options)
    elif to_hf or (
        opened.dialect == "hf" and (options.names or opened.checkpoint.format == "safetensors")
    ):
        raise UsageError(
            f"the tensors of `{opened.checkpoint.where}` have the names of no supported model"
            if opened.dialect is None
            else f"`{opened.checkpoint.where}` has no `{CONFIG}` with the sizes of its model",
            hint=f"`--hf-assets FOLDER` with a `{CONFIG}`, or `--model-name` and `--model-flavor`",
        )
    else:
        outputs, complete = _native(opened, model, options), not options.model_only
    if options.model_only and not outputs:
        raise UsageError(
            f"`{opened.checkpoint.where}` has no model, only {len(opened.others)} other tensors",
            hint="without `--model-only` they are converted; `holdfast show` lists them",
        )
    return ConvertPlan(opened, options, outputs, config, complete, assets, tuple(notes))


@dataclass(frozen=True, slots=True)
class _BothDialects:
    """A model that matches the table of its family, by native and by Hugging Face names."""

    mapping: TensorMapping
    native: Tensors
    """Tensors by Meta's names."""

    hf: Tensors
    notes: Sequence[str]


def _both_dialects(
    opened: ConvertSource, model: Tensors, config: Config, config_from: str
) -> _BothDialects:
    """Check the model against its family's table. All differences are listed in one error."""
    family = family_of(config, where=config_from)
    mapping = mapping_of(family, config)
    fused = opened.dialect == "hf" and fused_experts(family, config, model.infos)
    stored = mapping_of(family, config, fused_experts=True) if fused else mapping
    side: SideName = "hf" if opened.dialect == "hf" else "native"
    if side == "native":
        model = Renamed(model, renamed(model.infos, "meta"))
    rules = spelled(suggested(model.infos, stored.names(side)))
    hint = f"`{rules}` gives the expected names" if rules else _FIT_HINT
    notes = check_fit(
        model, stored, side, where=opened.checkpoint.where, config_from=config_from, hint=hint
    )
    if side == "native":
        native: Tensors = only(model, mapping.names("native"))
        return _BothDialects(mapping, native, Mapped(native, mapping, "hf"), notes)
    native = Mapped(model, stored, "native")
    hf = Mapped(native, mapping, "hf") if fused else _with_fixed_dtypes(model, mapping)
    return _BothDialects(mapping, native, hf, notes)


def _with_fixed_dtypes(model: Tensors, mapping: TensorMapping) -> Tensors:
    """Return the Hugging Face tensors; those whose dtype the table fixes are marked so."""
    tensors = only(model, mapping.names("hf"))
    for name in tensors.infos:
        dtype = mapping.dtype("hf", name)
        if dtype is not None:
            tensors.infos[name] = replace(tensors.infos[name], preferred=dtype, fixed=True)
    return tensors


def _outputs(tensors: Tensors, options: ConvertOptions) -> dict[str, Output]:
    """Return one output per tensor, without nesting."""
    return {
        name: Output(tensors, name, dtype_for(tensors, name, options.dtype), (name,))
        for name in tensors.infos
    }


def _from_hf(both: _BothDialects, options: ConvertOptions) -> Outputs:
    """Return the outputs of a Hugging Face model under native names."""
    outputs = _outputs(both.native, options)
    for name, first in both.mapping.aliases["native"].items():
        outputs[name] = replace(outputs[first], path=(name,), same_as=first)
    return _in_dialect(outputs, options.names or "meta", both.native)


def _in_dialect(outputs: Outputs, dialect: Literal["meta", "titan"], model: Tensors) -> Outputs:
    """Return outputs under the names of another native dialect, with the balancing biases that
    TorchTitan expects."""
    keys = {str(key) for output in outputs.values() for key in output.path}
    new_names = renamed([*outputs, *keys], dialect)
    added: dict[str, Output] = {}
    if dialect == "titan":
        above = next((o.path[:-1] for o in outputs.values() if o.path[-1] == o.name), ())
        zeros = Zeros(balances({name: info.shape for name, info in model.infos.items()}))
        for name, titan_name in renamed(zeros.infos, "titan").items():
            path = (*above, titan_name)
            added[_joined(path)] = Output(zeros, name, "float32", path)
    return {
        **added,
        **{
            new_names[name]: replace(
                output,
                path=tuple(new_names[key] if isinstance(key, str) else key for key in output.path),
                same_as=new_names[output.same_as] if output.same_as else "",
            )
            for name, output in outputs.items()
        },
    }


def _adapter(
    opened: ConvertSource,
    adapter: Mapping[str, Any],
    model: Tensors,
    base: tuple[Config | None, str],
    options: ConvertOptions,
) -> tuple[Outputs, str]:
    """Return the tensors to write for a PEFT adapter, and a note. The tensors have native names if
    the base model is known."""
    config, config_from = base
    base_option = f"--hf-assets {adapter.get('base_model_name_or_path') or 'FOLDER'}"
    if options.to == "hf":
        raise UsageError(
            f"`{opened.checkpoint.where}` is a PEFT adapter, but `--to hf` writes a whole model",
            hint="`--to dcp` or `--to torch`",
        )
    if config is None and options.names is not None:
        raise UsageError(
            f"`--names {options.names}` needs the base of this adapter", hint=base_option
        )
    note = (
        f"the scale of an adapter is not among its tensors: r is {adapter.get('r')}, lora_alpha "
        f"{adapter.get('lora_alpha')}"
    )
    if config is None:
        note += f"; without `{base_option}` tensors keep PEFT's names"
        return _native(opened, model, options), note
    config = of_language_model(config)
    table = mapping_of(family_of(config, where=config_from), config)
    names = options.names or "meta"
    mapping = adapter_mapping(model.infos, table, names=names, where=opened.checkpoint.where)
    return _outputs(Mapped(model, mapping, "native"), options), note


def _native(opened: ConvertSource, model: Tensors, options: ConvertOptions) -> Outputs:
    """Return outputs nested as in the source, renamed if requested, of all components."""
    if options.names is not None and opened.dialect is None:
        raise UsageError(
            f"`--names {options.names}`: the tensors of `{opened.checkpoint.where}` have the names "
            "of no supported model"
        )
    entries = opened.checkpoint.manifest.tensors
    tensors = [(model, name, opened.originals.get(name), options.dtype) for name in model.infos]
    if not options.model_only:
        tensors += [(opened.stored, name, name, None) for name in opened.others]
    outputs: dict[str, Output] = {}
    first_names: dict[object, str] = {}
    for source, name, original, dtype in tensors:
        path: Path = (name,)
        if original is not None:
            path = opened.path_of(name) if source is model else entries[original].path
        output = Output(source, name, dtype_for(source, name, dtype), path)
        full_name = _joined(path)
        if original is not None and entries[original].chunks:
            # Entries with the same chunks are names of one tensor.
            chunks = (entries[original].chunks, output.shape, output.dtype)
            first = first_names.setdefault(chunks, full_name)
            output = replace(output, same_as=first if first != full_name else "")
        outputs[full_name] = output
    return outputs if options.names is None else _in_dialect(outputs, options.names, model)


def _joined(path: Path) -> str:
    return ".".join(map(str, path))
