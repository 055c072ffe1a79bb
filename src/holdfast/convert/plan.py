"""What a conversion is to write: every tensor of the target, checked, before a byte is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from holdfast.catalog.hf_folder import CONFIG, of_language_model
from holdfast.convert.form import Form
from holdfast.convert.sizes import config_of_model
from holdfast.convert.source import ConvertSource, fetched, open_source
from holdfast.convert.stream import Output, Outputs, dtype_for
from holdfast.errors import UsageError
from holdfast.format.manifest import Path
from holdfast.format.names import MANIFEST
from holdfast.hf.adapter import adapter_mapping
from holdfast.hf.check import check_fit, skipped
from holdfast.hf.dialects import balances, renamed
from holdfast.hf.families import family_of
from holdfast.hf.family import Config, fused_experts, mapping_of
from holdfast.hf.shards import SHARD_BYTES
from holdfast.tensors.lazy import Mapped, Renamed, Tensors, Zeros, only
from holdfast.tensors.mapping import TensorMapping

Float = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How a checkpoint is to be converted."""

    to: Form

    hf_assets: str | None = None
    """Folder, or repository on the hub, whose configuration and tokenizer an export takes along."""

    dtype: Float | None = None
    """Of the model's floating-point tensors; None: as they are."""

    max_shard_bytes: int = SHARD_BYTES
    """Of one file of an export."""

    model_name: str | None = None
    """Family, by the name of the reference run: held against `config.json`."""

    model_flavor: str | None = None
    """Size, likewise; where there is no `config.json`, in its place."""

    model_only: bool = False
    """Leave out what is not the model's."""

    names: Literal["meta", "titan"] | None = None
    """What native tensors are to be called; None: as they are, and Meta's from the hub."""

    skip: tuple[str, ...] = ()
    """Patterns of tensors to leave out."""

    overwrite: bool = False
    """Replace what is at the target."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A conversion before anything is written."""

    opened: ConvertSource
    outputs: Outputs
    config: Config | None
    """Of the model, whole; None where nobody says, and it is not needed."""

    whole: bool
    """Whether all of the source is in it, not the model alone."""

    assets: str | None
    """Path of the folder whose files an export takes along."""

    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of all elements that will be written."""
        return sum(output.nbytes for output in self.outputs.values() if not output.same_as)


def plan(source: str, options: ConvertOptions) -> Planned:
    """Look at everything that can be looked at without reading data.

    Raises:
        NotFoundError: no checkpoint at `source`.
        MismatchError: its tensors are not those of the model; all differences are listed.
        UsageError: a wish that cannot be granted.
    """
    opened = open_source(source)
    assets = None if options.hf_assets is None else fetched(options.hf_assets, assets_only=True)
    model: Tensors = opened.model
    notes = list(opened.notes)
    if options.skip:
        left_out = skipped(model.held, options.skip)
        model = only(model, [name for name in model.held if name not in left_out])
        notes.append(f"{len(left_out)} tensors were left out, as asked")
    config, said_by = config_of_model(
        opened, model, assets, options.model_name, options.model_flavor
    )
    if config is None and options.to == "hf" and opened.manifest.model:
        config, said_by = dict(opened.manifest.model), f"`{opened.where}/{MANIFEST}`"
    related = None
    if opened.adapter is not None:
        outputs, note = _adapter(opened, opened.adapter, model, config, options)
        return Planned(opened, outputs, None, False, None, (*notes, note))
    if config is not None and opened.dialect is not None:
        related = _relate(opened, model, of_language_model(config), said_by)
        notes += related.notes
    whole = False
    if options.to == "hf":
        outputs = _to_hf(opened, related, options)
    elif opened.dialect == "hub" and (related or options.names or opened.format == "safetensors"):
        outputs = _from_hf(opened, related, options)
    else:
        outputs, whole = _as_it_is(opened, model, options), not options.model_only
    if options.model_only and not outputs:
        raise UsageError(
            f"`{opened.path}` holds no model: {len(opened.others)} tensors of other parts",
            hint="without `--model-only` they are converted; `holdfast show` says what they are",
        )
    return Planned(opened, outputs, config, whole, assets, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Related:
    """A model that fits the table of its family."""

    mapping: TensorMapping
    native: Tensors
    """Under Meta's names."""

    hub: Tensors
    notes: Sequence[str]


def _relate(opened: ConvertSource, model: Tensors, config: Config, said_by: str) -> _Related:
    """Raises MismatchError, with all that does not fit."""
    family = family_of(config, where=said_by)
    mapping = mapping_of(family, config)
    if opened.dialect != "hub":
        native = Renamed(model, renamed(model.held, "meta"))
        notes = check_fit(native, mapping, "native", where=opened.path, said_by=said_by)
        native = only(native, mapping.names("native"))
        return _Related(mapping, native, Mapped(native, mapping, "hub"), notes)
    fused = fused_experts(family, config, model.held)
    given = mapping_of(family, config, fused_experts=True) if fused else mapping
    notes = check_fit(model, given, "hub", where=opened.path, said_by=said_by)
    mapped = Mapped(model, given, "native")
    hub = Mapped(mapped, mapping, "hub") if fused else _fixed(model, mapping)
    return _Related(mapping, mapped, hub, notes)


def _fixed(model: Tensors, mapping: TensorMapping) -> Tensors:
    """The hub's tensors as they are, those marked whose dtype is not to change."""
    shown = only(model, mapping.names("hub"))
    for name in shown.held:
        dtype = mapping.dtype("hub", name)
        if dtype is not None:
            shown.held[name] = replace(shown.held[name], kept=dtype, fixed=True)
    return shown


def _to_hf(opened: ConvertSource, related: _Related | None, options: ConvertOptions) -> Outputs:
    if related is None:
        raise UsageError(
            f"the tensors of `{opened.path}` have names of no model that is known"
            if opened.dialect is None
            else f"`{opened.path}` does not say how large its model is",
            hint="`--hf-assets FOLDER` with its `config.json`, or `--model-name` and "
            "`--model-flavor`",
        )
    hub = related.hub
    return {n: Output(hub, n, dtype_for(hub, n, options.dtype), (n,)) for n in hub.held}


def _from_hf(opened: ConvertSource, related: _Related | None, options: ConvertOptions) -> Outputs:
    """The model under native names."""
    if related is None:
        raise UsageError(
            f"`{opened.where}` has no `{CONFIG}`, which says how large its model is",
            hint="`--hf-assets FOLDER` with it, or `--model-name` and `--model-flavor`",
        )
    native, aliases = related.native, related.mapping.aliases["native"]
    called = renamed([*native.held, *aliases], options.names or "meta")
    outputs = {
        called[n]: Output(native, n, dtype_for(native, n, options.dtype), (called[n],))
        for n in native.held
    }
    for name, first in aliases.items():
        path, same_as = (called[name],), called[first]
        outputs[called[name]] = replace(outputs[same_as], path=path, same_as=same_as)
    return {**outputs, **(_balances(native) if options.names == "titan" else {})}


def _balances(model: Tensors, above: Path = ()) -> Outputs:
    """What TorchTitan looks for beside every router, and nobody else has: zeros."""
    zeros = Zeros(balances({name: held.shape for name, held in model.held.items()}))
    found = {}
    for name, called in renamed(zeros.held, "titan").items():
        path = (*above, called)
        found[_join(path)] = Output(zeros, name, "float32", path)
    return found


def _adapter(
    opened: ConvertSource,
    said: Mapping[str, Any],
    model: Tensors,
    config: Config | None,
    options: ConvertOptions,
) -> tuple[Outputs, str]:
    """The factors of an adapter: under native names where its base is known. Returns a note too."""
    base = f"--hf-assets {said.get('base_model_name_or_path') or 'FOLDER'}"
    if options.to == "hf":
        raise UsageError(
            f"`{opened.path}` is an adapter of PEFT's, and `--to hf` writes a whole model",
            hint="`--to dcp` or `--to torch`",
        )
    if config is None and options.names is not None:
        raise UsageError(
            f"`--names {options.names}`: the base of this adapter decides what is called how",
            hint=base,
        )
    rank, alpha = said.get("r"), said.get("lora_alpha")
    note = f"r {rank}, lora_alpha {alpha}: the scale of an adapter is not among its tensors"
    if config is None:
        return _as_it_is(opened, model, options), f"{note}; names stay PEFT's without `{base}`"
    config = of_language_model(config)
    table = mapping_of(family_of(config, where=opened.where), config)
    names = options.names or "meta"
    mapping = adapter_mapping(model.held, table, names=names, where=opened.path)
    native = Mapped(model, mapping, "native")
    return {
        n: Output(native, n, dtype_for(native, n, options.dtype), (n,)) for n in native.held
    }, note


def _as_it_is(opened: ConvertSource, model: Tensors, options: ConvertOptions) -> Outputs:
    """Native tensors, nested as they are, renamed if that is wanted; and all others."""
    if options.names is not None and opened.dialect is None:
        raise UsageError(
            f"`--names {options.names}`: the tensors of `{opened.path}` have names of no model "
            "that is known"
        )
    outputs: dict[str, Output] = {}
    entries, chunks = opened.manifest.tensors, dict[object, str]()
    for name in model.held:
        original = opened.originals.get(name)
        path: Path = (name,) if original is None else entries[original].path
        dtype = dtype_for(model, name, options.dtype)
        _add(outputs, Output(model, name, dtype, path), chunks, opened, original)
    for name in () if options.model_only else opened.others:
        dtype = opened.stored.held[name].dtype
        _add(outputs, Output(opened.stored, name, dtype, entries[name].path), chunks, opened, name)
    if options.names is None:
        return outputs
    keys = {str(key) for output in outputs.values() for key in output.path}
    called = renamed([*outputs, *keys], options.names)
    above = next((o.path[:-1] for o in outputs.values() if o.path[-1] == o.name), ())
    more = _balances(model, above) if options.names == "titan" else {}
    return {
        **more,
        **{
            called[name]: replace(
                output,
                path=tuple(called[key] if isinstance(key, str) else key for key in output.path),
                same_as=called[output.same_as] if output.same_as else "",
            )
            for name, output in outputs.items()
        },
    }


def _add(
    outputs: dict[str, Output],
    output: Output,
    chunks: dict[object, str],
    opened: ConvertSource,
    original: str | None,
) -> None:
    """Add an output, as the second name of an earlier one where both are the same chunks."""
    full = _join(output.path)
    if original is not None:
        entry = opened.manifest.tensors[original]
        key = (entry.chunks, entry.shape, output.dtype)
        first = chunks.setdefault(key, full) if entry.chunks else full
        if first != full:
            output = replace(output, same_as=first)
    outputs[full] = output


def _join(path: Path) -> str:
    return ".".join(map(str, path))
