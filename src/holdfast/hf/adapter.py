"""PEFT adapters: low-rank factors of weights that have Hugging Face names.

If a native weight has its rows in another order than the Hugging Face weight, its left factor has
the native order too. With `W = B A`, permuting the rows of `W` permutes the rows of `B` and leaves
`A` unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from holdfast.errors import MismatchError
from holdfast.hf.dialects import renamed
from holdfast.tensors.lazy import TensorInfo
from holdfast.tensors.mapping import TensorMapping
from holdfast.tensors.relation import Dim, Relation, Side

PREFIX = "base_model.model."
"""Prefix that PEFT puts before the names of the base model."""

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def adapter_mapping(
    infos: Mapping[str, TensorInfo],
    base: TensorMapping,
    *,
    names: Literal["meta", "titan"],
    where: str,
) -> TensorMapping:
    """Return the mapping between the tensors `infos` of an adapter, under PEFT's names, and the
    same tensors under native names. `base`: mapping of the base model. `names`: dialect of the
    native names. `where`: path of the adapter, for messages.

    The native name of a factor is its weight's native name, with `lora_A` or `lora_B` added.
    Weights that were trained in full are mapped as in `base`.
    """
    native_names = renamed(base.names("native"), names)
    axes, relations, wrong = dict(base.axes), list[Relation](), list[str]()
    for name, info in infos.items():
        factor = _FACTOR.fullmatch(name)
        weight = f"{factor[1]}.weight" if factor else name
        relation = base.row_by_row("hf", weight.removeprefix(PREFIX))
        is_matrix = relation is not None and len(relation.hf.dims) == 2
        if relation is None or (factor and not is_matrix) or not name.startswith(PREFIX):
            wrong.append(f"`{name}` matches no weight of the base, or an expert or fused weight")
            continue
        native = native_names[relation.native.name]
        native_dims, hf_dims = relation.native.dims, relation.hf.dims
        if factor is not None:
            native = f"{native.removesuffix('.weight')}.lora_{factor[2]}.weight"
            rank = info.shape[factor[2] == "B"] if len(info.shape) == 2 else 0
            axes[f"rank{rank}"] = range(rank)
            dim = Dim(((f"rank{rank}",),))
            native_dims, hf_dims = (
                (dim, dims[1]) if factor[2] == "A" else (dims[0], dim)
                for dims in (native_dims, hf_dims)
            )
        relations.append(Relation(Side(native, native_dims), Side(name, hf_dims), relation.dtype))
    mapping = TensorMapping(relations, axes)
    wrong += _misfits(infos, mapping)
    if wrong:
        raise MismatchError(
            f"`{where}` does not fit its base, {len(wrong)} differences:\n  " + "\n  ".join(wrong),
            hint="without `--hf-assets` the adapter keeps PEFT's names; `--skip 'PATTERN'` leaves "
            "out tensors",
        )
    return mapping


def native_adapter_mapping(infos: Mapping[str, TensorInfo], base: TensorMapping) -> TensorMapping:
    """Return the mapping between the tensors `infos` of an adapter, under Meta's names, and the
    same tensors under PEFT's names. `base`: mapping of the base model.

    Tensors in `infos` that are not factors are mapped as in `base`.
    """
    hf_infos: dict[str, TensorInfo] = {}
    wrong = []
    for name, info in infos.items():
        factor = _FACTOR.fullmatch(name)
        weight = f"{factor[1]}.weight" if factor else name
        relation = base.row_by_row("native", weight)
        if relation is not None and factor is not None:
            hf_name = relation.hf.name.removesuffix(".weight")
            # Under native names, `lora_B` differs from PEFT's only in the order of its rows, and
            # `lora_A` not at all, so dtype and shape are the same.
            hf_infos[f"{PREFIX}{hf_name}.lora_{factor[2]}.weight"] = info
        elif relation is not None:
            hf_infos[PREFIX + relation.hf.name] = info
        elif factor is not None:
            wrong.append(f"`{name}` is a factor of an expert, a fused weight or an unknown one")
    if wrong:
        raise MismatchError(
            f"the adapter has {len(wrong)} tensors without a name in PEFT:\n  "
            + "\n  ".join(wrong),
            hint="`--skip 'PATTERN'` leaves out tensors",
        )
    return adapter_mapping(hf_infos, base, names="meta", where="the adapter")


def _misfits(infos: Mapping[str, TensorInfo], mapping: TensorMapping) -> Iterator[str]:
    for name in mapping.names("hf"):
        found, expected = infos[name].shape, mapping.shape("hf", name)
        if found != expected:
            yield f"`{name}` has shape {list(found)}, expected by its base: {list(expected)}"
        factor = _FACTOR.fullmatch(name)
        if factor:
            other = f"{factor[1]}.lora_{'B' if factor[2] == 'A' else 'A'}.weight"
            if other not in infos:
                yield f"`{name}` is there without `{other}`"
            elif factor[2] == "A" and infos[other].shape[-1:] != found[:1]:
                yield (
                    f"`{name}` has shape {list(found)}, but `{other}` {list(infos[other].shape)}"
                )
