"""Live models that are loaded and exported under their own names: Hugging Face's names, or names
that no table maps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from holdfast.errors import UsageError
from holdfast.hf.check import DERIVED, check_exportable
from holdfast.hf.dialects import CORRECTION_BIAS, dialect_of
from holdfast.hf.families import no_table, table_of
from holdfast.hf.family import Config, fused_experts, mapping_of
from holdfast.hf.shards import DtypeAndShape
from holdfast.tensors.lazy import Mapped, Renamed, TensorInfo, Tensors
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.numbers import is_floating
from holdfast.tensors.relation import Dim, Relation, Side

_ADAPTER = (".lora_A.", ".lora_B.", ".base_layer.")
"""Parts of names that only models with PEFT adapters have."""


def check_no_adapters(names: Iterable[str]) -> None:
    """Check that a live model has no adapters, so that it can be exported.

    Raises:
        UsageError: the model has adapters.
    """
    adapter = next((name for name in names if any(part in name for part in _ADAPTER)), None)
    if adapter is not None:
        raise UsageError(
            f"a model with adapters cannot be exported during training: it has `{adapter}`",
            hint="`holdfast convert STEP FOLDER --to hf --adapter-config FILE` makes a folder of "
            "PEFT from a checkpoint, with `--merge` a whole model",
        )


def keeps_names(names: Collection[str], config: Config | None) -> bool:
    """Return whether a live model whose tensors have these names is loaded and exported under its
    own names, without a family's table."""
    dialect = dialect_of(names)
    if dialect == "hf":
        return True
    return dialect is None and config is not None and table_of(config) is None


def own_names_mapping(infos: Mapping[str, TensorInfo]) -> TensorMapping:
    """Return the mapping of every tensor to itself."""
    relations, axes = list[Relation](), dict[str, range]()
    for name, info in infos.items():
        # Name an axis by its dim, since the axes of one tensor must differ, and by its size, since
        # tensors share axes.
        sizes = {f"dim{dim}_{size}": range(size) for dim, size in enumerate(info.shape)}
        axes.update(sizes)
        side = Side(name, tuple(Dim(((axis,),)) for axis in sizes))
        relations.append(Relation(side, side))
    return TensorMapping(relations, axes)


def own_dtypes(infos: Mapping[str, TensorInfo], dtype: str) -> dict[str, DtypeAndShape]:
    """Return dtype and shape of every tensor of an export in `dtype`. Correction biases of routers,
    and tensors that are not floating-point, keep their own dtype."""
    kept = {n for n, i in infos.items() if n.endswith(CORRECTION_BIAS) or not is_floating(i.dtype)}
    return {n: (i.dtype if n in kept else dtype, i.shape) for n, i in infos.items()}


def check_own_names(infos: Mapping[str, TensorInfo], config: Config) -> str:
    """Check that the tensors of a live model are those of its configuration, if a family's table
    describes them. Returns a note for the log.

    Raises:
        MismatchError: the table of the configuration describes other tensors.
    """
    family = table_of(config)
    if family is None:
        return no_table(config)
    mapping = mapping_of(family, config)
    fused = fused_experts(mapping, infos)
    if fused:
        mapping = mapping_of(family, config, fused_experts=True)
    check_exportable(infos, mapping, "hf")
    if fused:
        return (
            "the experts of a layer are in one tensor, as in the memory of transformers; `holdfast "
            "convert` of the export writes the published names"
        )
    return "the model has the names of Hugging Face, which the export keeps"


def tensors_for(
    hf_tensors: Tensors,
    names: Collection[str],
    tied: Collection[tuple[str, str]],
    config: Config | None,
) -> Tensors:
    """Return the tensors of a folder for a live model that has `names`.

    `tied`: pairs of names that share one tensor. The folder may have the tensor under only one of
    them.
    """
    family = None if config is None else table_of(config)
    if family is not None and config is not None:
        published = mapping_of(family, config)
        here, there = (fused_experts(published, one) for one in (names, hf_tensors.infos))
        if here != there:
            stored = mapping_of(family, config, fused_experts=there)
            native = Mapped(hf_tensors, stored, "native")
            hf_tensors = Mapped(native, mapping_of(family, config, fused_experts=here), "hf")
    kept = {n: n for n in hf_tensors.infos if n in names or not DERIVED.fullmatch(n)}
    aliases = {name: other for name, other in tied if name not in kept and other in kept}
    return Renamed(hf_tensors, kept, aliases)
