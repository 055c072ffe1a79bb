"""Base weights with the low-rank factors of a PEFT adapter added."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.errors import MismatchError
from holdfast.format.region import Region
from holdfast.hf.adapter import PREFIX
from holdfast.hf.check import listed
from holdfast.tensors.lazy import TensorInfo, Tensors
from holdfast.tensors.numbers import Array, Floats, floats, is_floating

_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class _Factors:
    """Two factors of one weight: `W + scale * B A`."""

    left: str
    """Name of B."""

    right: str
    """Name of A."""

    scale: float
    transposed: bool
    """Whether the weight has its inputs as rows: `W + scale * (B A)^T`."""


class Merged:
    """Tensors of a base model, with the factors of an adapter added in float32. They are read by
    boxes."""

    def __init__(self, base: Tensors, adapter: Tensors, config: Mapping[str, Any]) -> None:
        """`adapter` has the names of a folder of PEFT, `config` is its `adapter_config.json`.

        Raises:
            MismatchError: tensors of the adapter fit no weight of the base, or cannot be merged.
        """
        self._base, self._adapter = base, adapter
        self._factors: dict[str, _Factors] = {}
        self._replaced: dict[str, str] = {}
        self.infos: dict[str, TensorInfo] = {**base.infos}
        wrong = [
            f"`{key}` is {config[key]}, which cannot be merged"
            for key in ("use_dora", "lora_bias")
            if config.get(key)
        ]
        for name, info in adapter.infos.items():
            short = name.removeprefix(PREFIX)
            if name.endswith(_B) and name.removesuffix(_B) + _A in adapter.infos:
                continue
            if name.endswith(_A):
                wrong += self._add(short.removesuffix(_A), name.removesuffix(_A), config)
            elif short in base.infos and base.infos[short].shape == info.shape:
                self._replaced[short] = name
                self.infos[short] = info
            else:
                wrong.append(f"`{name}` {list(info.shape)} fits no weight of the base")
        if wrong:
            raise MismatchError(
                f"the adapter cannot be merged, {len(wrong)} reasons:{listed(wrong)}",
                hint="without `--merge` it becomes a folder of PEFT; `--skip 'PATTERN'` leaves out "
                "tensors",
            )

    def _add(self, module: str, name: str, config: Mapping[str, Any]) -> list[str]:
        """Plan to add the factors of a module to its weight when it is read. Returns the reason why
        they cannot be merged; empty if they can. `name`: beginning of the factors' names in the
        adapter. `config`: contents of `adapter_config.json`."""
        weight, infos = f"{module}.weight", self._adapter.infos
        transposed = config.get("fan_in_fan_out") is True
        if name + _B not in infos:
            return [f"`{name}{_A}` is there without `{name}{_B}`"]
        left, right = infos[name + _B].shape, infos[name + _A].shape
        product = (left[0], right[1]) if len(left) == len(right) == 2 else ()
        found = self._base.infos.get(weight)
        if found is None or not is_floating(found.dtype):
            return [f"`{name}{_A}` fits no weight of the base: there is no `{weight}`"]
        if left[1:] != right[:1] or found.shape != (product[::-1] if transposed else product):
            return [f"`{weight}` is {list(found.shape)}, its factors {list(left)} x {list(right)}"]
        rank, alpha = (
            _of_module(module, config, pattern, default)
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if rank != right[0] or not isinstance(alpha, int | float):
            return [f"`{name}{_A}` has rank {right[0]}, its configuration says {rank}"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self._factors[weight] = _Factors(name + _B, name + _A, scale, transposed)
        self.infos[weight] = TensorInfo("float32", found.shape, found.write_dtype, found.fixed)
        return []

    def read(self, name: str, region: Region) -> Array:
        if name in self._replaced:
            return self._adapter.read(self._replaced[name], region)
        elements = self._base.read(name, region)
        if name not in self._factors:
            return elements
        factors = self._factors[name]
        rows, columns = (1, 0) if factors.transposed else (0, 1)
        rank = self._adapter.infos[factors.right].shape[0]
        left = self._floats(
            factors.left, Region((region.start[rows], 0), (region.stop[rows], rank))
        )
        right = self._floats(
            factors.right, Region((0, region.start[columns]), (rank, region.stop[columns]))
        )
        product = np.float32(factors.scale) * (left @ right)
        weights = floats(elements, self._base.infos[name].dtype)
        return weights + (product.T if factors.transposed else product)

    def _floats(self, name: str, region: Region) -> Floats:
        return floats(self._adapter.read(name, region), self._adapter.infos[name].dtype)


def _of_module(module: str, config: Mapping[str, Any], patterns: str, default: str) -> Any:
    """Return the rank, or the `lora_alpha`, of a module. `config[patterns]` maps patterns for the
    names of modules to values, and the first pattern that matches counts. If none matches, the
    value is `config[default]`."""
    by_pattern = config.get(patterns) or {}
    keys: Iterable[str] = by_pattern if isinstance(by_pattern, Mapping) else ()
    for key in keys:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return by_pattern[key]
        except re.error as error:
            raise MismatchError(f"`{patterns}` has an invalid pattern `{key}`: {error}") from error
    return config.get(default)
