"""Adapters as PEFT saves them: factors of low rank beside weights that the hub names.

A weight whose rows lie in another order here has its left factor's rows in that order too: with
`W = B A`, permuting the rows of `W` permutes those of `B`, and leaves `A` alone.
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
"""What PEFT puts before the names of the model that it wraps."""

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def adapter_mapping(
    held: Mapping[str, TensorInfo],
    base: TensorMapping,
    *,
    names: Literal["meta", "titan"],
    where: str,
) -> TensorMapping:
    """Between the tensors of an adapter and native ones: the weight's name with `lora_A` or
    `lora_B` in it. Weights that were trained whole are mapped as the base's are.

    Raises:
        MismatchError: listing all that fit no weight of the base, or one that does not lie row by
            row on both sides, such as an expert's or one of a fused pair.
    """
    called = renamed(base.names("native"), names)
    axes, relations, wrong = dict(base.axes), list[Relation](), list[str]()
    for name, tensor in held.items():
        factor = _FACTOR.fullmatch(name)
        weight = f"{factor[1]}.weight" if factor else name
        found = base.alone("hub", weight.removeprefix(PREFIX))
        low = factor is None or (found is not None and len(found.hub.dims) == 2)
        if found is None or not low or not name.startswith(PREFIX):
            wrong.append(f"`{name}` belongs to no weight that is one tensor on both sides")
            continue
        sides = called[found.native.name], weight
        if factor is None:
            relations.append(_between(found, sides, found.native.dims, found.hub.dims))
            continue
        rank = tensor.shape[factor[2] == "B"] if len(tensor.shape) == 2 else 0
        axes[f"rank{rank}"] = range(rank)
        ours, theirs = _factors(found, factor[2], Dim(((f"rank{rank}",),)))
        spelled = f".lora_{factor[2]}.weight"
        of = sides[0].removesuffix(".weight") + spelled, name
        relations.append(_between(found, of, ours, theirs))
    mapping = TensorMapping(relations, axes)
    wrong += _misfits(held, mapping)
    if wrong:
        raise MismatchError(
            f"`{where}` does not fit its base, {len(wrong)} differences:\n  " + "\n  ".join(wrong),
            hint="without `--hf-assets` the adapter keeps PEFT's names; `--skip 'PATTERN'` leaves "
            "tensors out",
        )
    return mapping


def _factors(of: Relation, factor: str, rank: Dim) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Dims of one factor, on both sides."""
    ours, theirs = of.native.dims, of.hub.dims
    if factor == "A":
        return (rank, ours[1]), (rank, theirs[1])
    return (ours[0], rank), (theirs[0], rank)


def _between(
    of: Relation, names: tuple[str, str], ours: tuple[Dim, ...], theirs: tuple[Dim, ...]
) -> Relation:
    return Relation(Side(names[0], ours), Side(names[1], theirs), of.dtype)


def _misfits(held: Mapping[str, TensorInfo], mapping: TensorMapping) -> Iterator[str]:
    for name in mapping.names("hub"):
        found, wanted = held[name].shape, mapping.shape("hub", name)
        if found != wanted:
            yield f"`{name}` is {list(found)}, its base makes it {list(wanted)}"
        factor = _FACTOR.fullmatch(name)
        if factor:
            other = f"{factor[1]}.lora_{'B' if factor[2] == 'A' else 'A'}.weight"
            if other not in held:
                yield f"`{name}` is there without `{other}`"
            elif factor[2] == "A" and held[other].shape[-1:] != found[:1]:
                yield f"`{name}` is {list(found)}, and `{other}` {list(held[other].shape)}"
