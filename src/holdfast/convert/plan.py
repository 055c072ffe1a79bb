"""Planning of a conversion: every tensor of the target, checked before any data is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as shortened
from typing import Any, Literal

from holdfast.catalog.hf_folder import ADAPTER_CONFIG, CONFIG, of_language_model
from holdfast.convert.adapter import (
    adapter_config_of,
    base_of,
    has_adapter,
    merged,
    notes_on,
    open_adapter,
)
from holdfast.convert.sizes import config_of_model
from holdfast.convert.source import ConvertSource, check_is_no_file, fetched, open_source
from holdfast.convert.stream import Output, Outputs, dtype_for
from holdfast.convert.target_format import TargetFormat
from holdfast.convert.towers import absent_parts, completed, other_names
from holdfast.convert.trained import value_notes
from holdfast.errors import UsageError
from holdfast.format.manifest import Path
from holdfast.format.names import MANIFEST
from holdfast.hf.adapter import adapter_mapping
from holdfast.hf.check import HINT, check_fit, skipped
from holdfast.hf.dialects import CORRECTION_BIAS, balances, renamed
from holdfast.hf.families import family_of, no_table, table_of
from holdfast.hf.family import Config, Family, fused_experts, mapping_of
from holdfast.hf.shards import SHARD_BYTES
from holdfast.tensors.lazy import Mapped, Renamed, Tensors, Zeros, only
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.quantized import QUANTIZED
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
    """Dialect of native names in the target; None: the source's, or Meta's for a Hugging Face
    source."""

    skip: tuple[str, ...] = ()
    """Shell patterns for the names of tensors to leave out."""

    renames: tuple[str, ...] = ()
    """Rules `theirs=ours` for the names of the model's tensors."""

    overwrite: bool = False
    """Whether to replace an existing target."""

    adapter_config: str | None = None
    """Path of the `adapter_config.json` for the adapters in the source, or of its folder. Used by
    exports."""

    merge: bool = False
    """Whether an export merges the adapters into their base."""

    push_to_hub: str | None = None
    """Name of the hub repository to upload the export to, or None. An uploaded export gets a model
    card."""


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
    adapter: Mapping[str, Any] | None = None
    """Contents of `adapter_config.json`, if the target is a folder of PEFT."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements to write."""
        return sum(output.nbytes for output in self.outputs.values() if not output.same_as)


def plan(source: str, options: ConvertOptions) -> ConvertPlan:
    """Plan a conversion, with all checks that need no data."""
    opened = open_source(source, options.renames)
    assets = None
    if options.hf_assets is not None:
        check_is_no_file(options.hf_assets, "--hf-assets")
        assets = fetched(options.hf_assets, assets_only=not options.merge)
    model: Tensors = opened.model
    notes = list(opened.notes)
    left_out: set[str] = set()
    if options.skip:
        left_out = skipped(model.infos, options.skip)
        model = only(model, [name for name in model.infos if name not in left_out])
        consequence = ", which loaders give random values if the model has them"
        note = f"left out {len(left_out)} tensors that match `--skip`"
        notes.append(note + consequence * (options.to == "hf"))
    config, config_from = config_of_model(
        opened, model, assets, options.model_name, options.model_flavor
    )
    if config is None and options.to == "hf" and opened.checkpoint.manifest.model:
        config, config_from = (
            dict(opened.checkpoint.manifest.model),
            f"`{opened.checkpoint.where}/{MANIFEST}`",
        )
    to_hf, complete = options.to == "hf", False
    if planned := _adapter_plan(opened, model, (config, config_from), assets, options):
        values = value_notes(opened, config, config_from, to_hf=to_hf)
        return replace(planned, notes=(*notes, *values, *planned.notes))
    both = None
    keeps_names = config is not None and _keeps_names(opened, config)
    if config is not None and opened.dialect is not None and not keeps_names:
        both = _both_dialects(opened, model, of_language_model(config), config_from)
        notes += both.notes
    # Values come after tensors, since errors about tensors show a wrong configuration better.
    notes += value_notes(opened, config, config_from, to_hf=to_hf)
    if keeps_names and config is not None:
        outputs, complete = _with_own_names(opened, model, config, options)
        notes.append(no_table(config))
        notes += _packed_notes(outputs) if to_hf else []
    elif both is not None and config is not None and to_hf:
        is_hf = opened.dialect == "hf"
        lost = other_names(both.family, [*left_out], hf=is_hf)
        export = completed(both.family, config, both.towers, assets, lost)
        names = {name: name.removeprefix(export.prefix) for name in both.hf.infos}
        outputs = _outputs(Renamed(both.hf, names), options) | _kept(export.towers, options)
        config, notes = export.config, [*notes, *export.notes]
    elif both is not None and opened.dialect == "hf":
        outputs = _from_hf(both, options) | _kept(both.towers, options)
    elif to_hf or (
        opened.dialect == "hf" and (options.names or opened.checkpoint.format == "safetensors")
    ):
        raise _no_names(opened, model, config, config_from)
    else:
        outputs, complete = _native(opened, model, options), not options.model_only
    if to_hf and config is not None:
        notes += absent_parts(config, outputs)
    if options.model_only and not outputs:
        raise UsageError(
            f"`{opened.checkpoint.where}` has no model, only {len(opened.others)} other tensors",
            hint="without `--model-only` they are converted; `holdfast show` lists them",
        )
    return ConvertPlan(opened, options, outputs, config, complete, assets, tuple(notes))


def _no_names(
    opened: ConvertSource, model: Tensors, config: Config | None, config_from: str
) -> UsageError:
    """Return the error for tensors that cannot get Hugging Face's names."""
    where = opened.checkpoint.where
    if opened.dialect is not None:
        what = f"`{where}` has no `{CONFIG}` with the sizes of its model"
    elif config is None:
        what = f"the tensors of `{where}` have the names of no supported model"
    else:
        kind = shortened(config.get("model_type"))
        first = ", ".join(f"`{name}`" for name in [*model.infos][:3])
        return UsageError(
            f"the tensors of `{where}` do not have the names of {config_from}, a model of type "
            f"{kind}: {first}, ...",
            hint=f"`--rename 'THEIRS=OURS'` gives other names; if it is another model, "
            f"`--hf-assets FOLDER` with a `{CONFIG}` of its own type, and the names stay",
        )
    return UsageError(
        what,
        hint=f"`--hf-assets FOLDER` with a `{CONFIG}`, or `--model-name` and `--model-flavor`",
    )


def _keeps_names(opened: ConvertSource, config: Config) -> bool:
    """Return whether the tensors keep their names, since no family has a table for the model."""
    if table_of(config) is not None:
        return False
    if opened.checkpoint.hf is not None or opened.dialect not in ("meta", "titan"):
        return True
    # The names look native, but a model without a table may have such names too. Assume such a
    # model only if the checkpoint has a configuration of its own, and that has no table either.
    stored = opened.checkpoint.manifest.model
    return bool(stored) and table_of(stored) is None


def _with_own_names(
    opened: ConvertSource, model: Tensors, config: Config, options: ConvertOptions
) -> tuple[Outputs, bool]:
    """Return the tensors to write, under the names that they have in the source, and whether the
    target gets the whole source, not only the model."""
    if options.names is not None:
        raise UsageError(
            f"`--names {options.names}` needs a table: {no_table(config)}",
            hint="leave out `--names`",
        )
    model = only(model, [*model.infos])
    for name, info in model.infos.items():
        if name.endswith(CORRECTION_BIAS):
            model.infos[name] = replace(info, fixed=True)
    if options.to == "hf":
        return _outputs(only(model, _first_names(opened, model)), options), False
    return _native(opened, model, options), not options.model_only


def _packed_notes(outputs: Outputs) -> list[str]:
    """Return a note if an export has quantized matrices, which its configuration does not
    mention."""
    packed = [
        output
        for output in outputs.values()
        if len(output.shape) > 1 and output.dtype.startswith(QUANTIZED)
    ]
    if not packed:
        return []
    return [
        f"{len(packed)} tensors such as `{packed[0].name}` are {packed[0].dtype}, and `{CONFIG}` "
        "names no quantization: loaders use their numbers as they are"
    ]


def _first_names(opened: ConvertSource, model: Tensors) -> list[str]:
    """Return the first name of each tensor. Exports do not have the further names of tied
    tensors."""
    first_names = dict[object, str]()
    for name in model.infos:
        first_names.setdefault(_stored(opened, opened.originals.get(name)) or name, name)
    return [*first_names.values()]


def _stored(opened: ConvertSource, original: str | None) -> object | None:
    """Return a key that is equal for all names of one stored tensor; None if the tensor cannot
    have several names. `original`: one of the names, in the manifest."""
    entry = opened.checkpoint.manifest.tensors.get(original or "")
    if entry is None or not entry.chunks or 0 in entry.shape:
        return None
    # Shape and strides are in the key: a matrix and its transpose may share data in files of torch.
    return entry.chunks, entry.shape, entry.dtype, opened.checkpoint.strides.get(original or "")


@dataclass(frozen=True, slots=True)
class _BothDialects:
    """A model that matches its family's table, under native and under Hugging Face names."""

    family: Family
    mapping: TensorMapping
    native: Tensors
    """Tensors under Meta's names."""

    hf: Tensors
    towers: Tensors | None
    """Tensors of a multimodal model besides its language model's; None: there are none."""

    notes: Sequence[str]


def _both_dialects(
    opened: ConvertSource, model: Tensors, config: Config, config_from: str
) -> _BothDialects:
    """Check the model against its family's table, and return it in both dialects. All differences
    are listed in one error. `config_from`: origin of `config`, for messages."""
    family = family_of(config, where=config_from)
    mapping = mapping_of(family, config)
    others = other_names(family, [*model.infos], hf=opened.dialect == "hf")
    towers = only(model, others) if others else None
    model = only(model, [name for name in model.infos if name not in {*others}])
    fused = opened.dialect == "hf" and fused_experts(mapping, model.infos)
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
        hf: Tensors = Mapped(native, mapping, "hf")
        return _BothDialects(family, mapping, native, hf, towers, notes)
    native = Mapped(model, stored, "native")
    hf = Mapped(native, mapping, "hf") if fused else _with_fixed_dtypes(model, mapping)
    return _BothDialects(family, mapping, native, hf, towers, notes)


def _with_fixed_dtypes(model: Tensors, mapping: TensorMapping) -> Tensors:
    """Return the tensors of a model that has Hugging Face names. A tensor whose dtype the mapping
    fixes is written in this dtype, whatever the user requests."""
    tensors = only(model, mapping.names("hf"))
    for name in tensors.infos:
        dtype = mapping.dtype("hf", name)
        if dtype is not None:
            tensors.infos[name] = replace(tensors.infos[name], preferred=dtype, fixed=True)
    return tensors


def _outputs(tensors: Tensors, options: ConvertOptions) -> dict[str, Output]:
    """Return one output per tensor, by name. Its path is only its name: if the target has nested
    dicts, all these tensors are in the outermost dict."""
    return {
        name: Output(tensors, name, dtype_for(tensors, name, options.dtype), (name,))
        for name in tensors.infos
    }


def _kept(towers: Tensors | None, options: ConvertOptions) -> dict[str, Output]:
    """Return one output per tensor of `towers`, the parts of a multimodal model besides its
    language model. None: there are no such parts."""
    return {} if towers is None else _outputs(towers, options)


def _from_hf(both: _BothDialects, options: ConvertOptions) -> dict[str, Output]:
    """Return a Hugging Face model's tensors to write, under native names."""
    outputs = _outputs(both.native, options)
    for name, first in both.mapping.aliases["native"].items():
        outputs[name] = replace(outputs[first], path=(name,), same_as=first)
    return _in_dialect(outputs, options.names or "meta", both.native)


def _in_dialect(
    outputs: Outputs, dialect: Literal["meta", "titan"], model: Tensors
) -> dict[str, Output]:
    """Return the outputs under the names of native dialect `dialect`. For `titan`, add the biases
    by which TorchTitan balances experts, as zeros, where they are missing. `model`: tensors of the
    model, under native names."""
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


def _adapter_plan(
    opened: ConvertSource,
    model: Tensors,
    base: tuple[Config | None, str],
    assets: str | None,
    options: ConvertOptions,
) -> ConvertPlan | None:
    """Return the plan for a source with adapters; None if the source is converted like any model.
    `base`: configuration of the base model, and its origin for messages."""
    hf, (config, config_from) = opened.checkpoint.hf, base
    is_adapter = hf is not None and hf.adapter is not None
    if options.merge and options.to != "hf":
        raise UsageError("`--merge` writes a whole model, and needs `--to hf`")
    if is_adapter and not options.merge:
        outputs, note = _adapter(opened, hf.adapter, model, base, options)  # type: ignore[union-attr, arg-type]
        return ConvertPlan(opened, options, outputs, None, False, None, (note,))
    if options.to != "hf" or not has_adapter(model):
        if options.merge or options.adapter_config is not None:
            raise UsageError(
                f"`{opened.checkpoint.where}` has no adapters to export"
                if options.to == "hf"
                else f"`--adapter-config` is for an export, found: `--to {options.to}`",
                hint="leave out `--merge` and `--adapter-config`",
            )
        return None
    adapter_config = adapter_config_of(opened, options.adapter_config)
    table = None
    if config is not None and table_of(config) is not None:
        config_of_text = of_language_model(config)
        table = mapping_of(family_of(config_of_text, where=config_from), config_of_text)
    model = only(model, _first_names(opened, model))
    adapter = open_adapter(opened, model, adapter_config, table)
    notes = tuple(notes_on(adapter, is_merged=options.merge))
    if not options.merge:
        outputs = _outputs(adapter.tensors, options)
        return ConvertPlan(opened, options, outputs, None, False, None, notes, adapter_config)
    source = base_of(adapter, opened, assets)
    outputs = _outputs(merged(adapter, source), options)
    if config is None:
        raise UsageError(
            f"`{assets or opened.checkpoint.where}` has no `{CONFIG}` of the base",
            hint=f"`--hf-assets` with the folder or name of the base: `{adapter.base_name}`",
        )
    notes += () if source is None else source.notes
    return ConvertPlan(opened, options, outputs, config, False, assets, notes)


def _adapter(
    opened: ConvertSource,
    adapter: Mapping[str, Any],
    model: Tensors,
    base: tuple[Config | None, str],
    options: ConvertOptions,
) -> tuple[Outputs, str]:
    """Return the tensors to write for a PEFT adapter, and a note for the user. The tensors have
    native names if the configuration of the base model is known. `base`: this configuration, and
    its origin for messages."""
    config, config_from = base
    base_option = f"--hf-assets {adapter.get('base_model_name_or_path') or 'FOLDER'}"
    if options.to == "hf":
        raise UsageError(
            f"`{opened.checkpoint.where}` is a PEFT adapter, but `--to hf` writes a whole model",
            hint="`--to dcp` or `--to torch`; `--merge` adds it to its base in `--hf-assets`",
        )
    if config is None and options.names is not None:
        raise UsageError(
            f"`--names {options.names}` needs the base of this adapter", hint=base_option
        )
    kind = adapter.get("peft_type", "LORA")
    note = (
        f"the scale of an adapter is not among its tensors: r is {adapter.get('r')}, lora_alpha "
        f"{adapter.get('lora_alpha')}"
        if kind == "LORA"
        else f"the `{ADAPTER_CONFIG}` of this adapter, {shortened(kind)}, is not in the target"
    )
    if config is None:
        note += f"; without `{base_option}` tensors keep PEFT's names"
        return _native(opened, model, options), note
    config = of_language_model(config)
    table = mapping_of(family_of(config, where=config_from), config)
    names = options.names or "meta"
    mapping = adapter_mapping(model.infos, table, names=names, where=opened.checkpoint.where)
    return _outputs(Mapped(model, mapping, "native"), options), note


def _native(opened: ConvertSource, model: Tensors, options: ConvertOptions) -> dict[str, Output]:
    """Return the tensors of all requested components as outputs, nested as in the source. They are
    renamed if the user requests a native dialect."""
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
        if stored := _stored(opened, original):
            first = first_names.setdefault((stored, output.dtype), full_name)
            output = replace(output, same_as=first if first != full_name else "")
        outputs[full_name] = output
    return outputs if options.names is None else _in_dialect(outputs, options.names, model)


def _joined(path: Path) -> str:
    return ".".join(map(str, path))
