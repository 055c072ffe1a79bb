"""Dequantization on reading: fp8 with a factor per block, row or tensor, and MXFP4.

Stored fp8 numbers are multiplied by their factors. Sources of the formats: DeepSeek V3's
`README_WEIGHTS.md` (each block of 128 x 128 elements of `X.weight` has one factor in
`X.weight_scale_inv`); compressed-tensors, FBGEMM and ModelOpt (one factor per row or tensor, in
`X.weight_scale`); and the OCP Microscaling Formats specification 1.0 (each group of 32 elements of
4 bits shares an exponent of 8 bits; gpt-oss stores the elements as `X_blocks` and the exponents as
`X_scales`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from reprlib import repr as shortened
from typing import Any

import numpy as np

from holdfast.errors import FormatError
from holdfast.format.region import Region
from holdfast.spelling import listed
from holdfast.tensors.lazy import TensorInfo, Tensors
from holdfast.tensors.numbers import QUANTIZED_FLOATS, Array, Floats, floats

PREFERRED = "bfloat16"
"""Dtype to write dequantized tensors in: these models were trained in it."""

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"

PLAIN_SCALE = "_scale"
"""Suffix of the names of fp8 factors per row or per tensor."""

_WEIGHT = ".weight"

_ACTIVATIONS = (".input_scale", ".output_scale", ".activation_scale")
"""Suffixes of the names of factors for activations. Unquantized models do not have such factors."""

BLOCK = (128, 128)
"""Default shape of fp8 blocks. All elements of a block share one factor."""

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PAIR_OF_BYTE = np.array(
    [
        [(-1.0 if nibble & 8 else 1.0) * _FP4_VALUES[nibble & 7] for nibble in (b & 15, b >> 4)]
        for b in range(256)
    ],
    np.float32,
)
"""The two MXFP4 numbers in a byte, by the value of the byte. The low half comes first."""

LISTED_MAX = 10
"""Most tensors in one error."""

READABLE = (None, "fp8", "mxfp4")
"""Values of `quant_method` whose tensors can be read."""

QUANTIZED = ("int8", *QUANTIZED_FLOATS)
"""Prefixes of dtypes that only quantized weights have."""

_PACKED = ("uint8", "int32", *QUANTIZED)
"""Prefixes of dtypes that quantized weights may have."""

GROUP = 32
"""Number of MXFP4 elements that share an exponent. Together they take 16 bytes."""


class Dequantized:
    """Tensors of a source, dequantized. A quantized tensor and its factors appear as one float
    tensor."""

    def __init__(
        self, source: Tensors, config: Mapping[str, Any], *, keeps_fp8: bool = False
    ) -> None:
        """`config`: `quantization_config` of the folder, or empty. `keeps_fp8`: whether fp8 tensors
        without factors are kept unchanged, as in checkpoints of training runs. Otherwise they are
        an error."""
        self._source = source
        infos, unsupported = source.infos, list[str]()
        _check_method(infos, config)
        self._block = _block_in(config)
        self._in_blocks = isinstance(config, Mapping) and bool(config.get("weight_block_size"))
        self._scale_of = _scales(infos)
        scales = {*self._scale_of.values()}
        modules = {n.removesuffix(_WEIGHT) for n in self._scale_of if n.endswith(_WEIGHT)}
        activations = {
            name
            for name in infos
            if name.endswith(_ACTIVATIONS) and name.rpartition(".")[0] in modules
        }
        self.infos: dict[str, TensorInfo] = {}
        self.num_quantized: int = 0
        for name, info in infos.items():
            if name in scales or name in activations:
                continue
            if name.endswith(SCALES) and _sibling(name, SCALES, BLOCKS) in infos:
                continue
            shape = info.shape
            if name in self._scale_of:
                unsupported += self._check_fp8(name)
            elif name.endswith(BLOCKS) and _sibling(name, BLOCKS, SCALES) in infos:
                unsupported += self._check_mxfp4(name)
                experts, rows, groups, _ = (*shape, 0, 0, 0, 0)[:4]
                name, shape = name.removesuffix(BLOCKS), (experts, groups * GROUP, rows)
            else:
                if info.dtype.startswith(QUANTIZED_FLOATS) and not keeps_fp8:
                    unsupported.append(f"`{name}` is {info.dtype}, without its `{name}{SCALE}`")
                self.infos[name] = info
                continue
            self.num_quantized += 1
            self.infos[name] = TensorInfo("float32", shape, PREFERRED)
        if unsupported:
            raise FormatError(
                f"unsupported quantization of {len(unsupported)} tensors:"
                + listed(unsupported, LISTED_MAX),
                hint="fp8 with factors per block, row or tensor and MXFP4 can be read; convert the "
                "weights that these were made from",
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Note for the user on the number of dequantized tensors, if there are any."""
        num = self.num_quantized
        return (f"{num} quantized tensors are dequantized",) if num else ()

    def read(self, name: str, region: Region) -> Array:
        if name + BLOCKS in self._source.infos:
            return self._read_mxfp4(name, region)
        if name in self._scale_of:
            return self._read_fp8(name, region)
        return self._source.read(name, region)

    def _read_fp8(self, name: str, region: Region) -> Floats:
        """Read a box of an fp8 weight `[..., r, c]`. The weight has one factor per block of its
        last two dims, or factors whose shape can be broadcast to the weight's."""
        bits = self._source.read(name, region)
        broadcast = self._broadcast(name)
        if broadcast is not None:
            return self._read_broadcast(name, region, bits, broadcast)
        outer = len(region.start) - len(self._block)
        inner = region.start[outer:], region.stop[outer:]
        first = tuple(start // size for start, size in zip(inner[0], self._block, strict=True))
        last = tuple(-(-stop // size) for stop, size in zip(inner[1], self._block, strict=True))
        box = Region((*region.start[:outer], *first), (*region.stop[:outer], *last))
        scale = self._scale_of[name]
        factors = floats(self._source.read(scale, box), self._source.infos[scale].dtype)
        rows = np.arange(inner[0][0], inner[1][0]) // self._block[0] - first[0]
        columns = np.arange(inner[0][1], inner[1][1]) // self._block[1] - first[1]
        values = floats(bits, self._source.infos[name].dtype)
        for block in range(factors.shape[-2]):
            # One row of blocks at a time: a factor for every element would double the memory.
            values[..., rows == block, :] *= factors[..., block, None, :][..., columns]
        return values

    def _broadcast(self, name: str) -> tuple[int, ...] | None:
        """Return the shape by which a weight's factors are broadcast, with one dim per dim of the
        weight. None: the factors are per block, or of an unknown kind."""
        weight = self._source.infos[name].shape
        scale = self._source.infos[self._scale_of[name]].shape
        if self._in_blocks or scale == self._blocks_of(weight):
            return None
        if prod(scale) == 1:
            return (1,) * len(weight)
        full = (*scale, 1) if len(scale) == len(weight) - 1 else scale
        if len(full) != len(weight) or any(
            one not in (1, size) for one, size in zip(full, weight, strict=True)
        ):
            return None
        return full

    def _blocks_of(self, weight: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that the factors of a weight have if they are per block; None if the
        weight has too few dims."""
        outer = len(weight) - len(self._block)
        if outer < 0:
            return None
        sizes = zip(weight[outer:], self._block, strict=True)
        return weight[:outer] + tuple(-(-size // block) for size, block in sizes)

    def _read_broadcast(
        self, name: str, region: Region, bits: Array, shape: tuple[int, ...]
    ) -> Floats:
        """Multiply `bits`, a box of a weight, by its factors. `shape`: shape by which the factors
        are broadcast."""
        scale = self._scale_of[name]
        info = self._source.infos[scale]
        # Read all factors: there is usually at most one per row.
        factors = floats(self._source.read(scale, Region.whole(info.shape)), info.dtype)
        box = tuple(
            slice(start, stop) if size > 1 else slice(None)
            for start, stop, size in zip(region.start, region.stop, shape, strict=True)
        )
        values = floats(bits, self._source.infos[name].dtype)
        values *= factors.reshape(shape)[box]
        return values

    def _read_mxfp4(self, name: str, region: Region) -> Array:
        """Read a box of a weight `[e, k, r]`, which is stored transposed: `[e, r, k]`."""
        (e0, k0, r0), (e1, k1, r1) = region.start, region.stop
        g0, g1 = k0 // GROUP, -(-k1 // GROUP)
        box = Region((e0, r0, g0, 0), (e1, r1, g1, GROUP // 2))
        blocks = self._source.read(name + BLOCKS, box)
        scales = self._source.read(name + SCALES, Region((e0, r0, g0), (e1, r1, g1)))
        values: Floats = _PAIR_OF_BYTE[blocks]
        np.ldexp(values, scales.astype(np.int32)[..., None, None] - 127, out=values)
        rows = values.reshape(e1 - e0, r1 - r0, (g1 - g0) * GROUP)
        return rows[:, :, k0 - g0 * GROUP : k1 - g0 * GROUP].transpose(0, 2, 1)

    def _check_fp8(self, name: str) -> list[str]:
        weight, scale = self._source.infos[name], self._source.infos[self._scale_of[name]]
        fits = scale.shape == self._blocks_of(weight.shape) or self._broadcast(name) is not None
        if fits and weight.dtype.startswith("float8"):
            return []
        end = self._scale_of[name].removeprefix(name)
        return [
            f"`{name}` is {weight.dtype} {list(weight.shape)}, its `{end}` {list(scale.shape)}, "
            f"with blocks of {list(self._block)}"
        ]

    def _check_mxfp4(self, name: str) -> list[str]:
        scales_name = _sibling(name, BLOCKS, SCALES)
        blocks, scales = self._source.infos[name], self._source.infos[scales_name]
        packed = len(blocks.shape) == 4 and blocks.shape[3] * 2 == GROUP
        if packed and scales.shape == blocks.shape[:3] and blocks.dtype == scales.dtype == "uint8":
            return []
        return [
            f"`{name}` is {blocks.dtype} {list(blocks.shape)}, `{scales_name}` {scales.dtype} "
            f"{list(scales.shape)}"
        ]


def _check_method(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
    """Raise a FormatError if the weights are quantized by a method that cannot be read."""
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method in READABLE:
        return
    scaled = _scales(infos)
    packed = [
        name
        for name, info in infos.items()
        if info.dtype.startswith(_PACKED) and name not in scaled
    ]
    if packed:
        raise FormatError(
            f"the weights are quantized by {shortened(method)}, which cannot be read: "
            f"{len(packed)} tensors, such as `{packed[0]}` {infos[packed[0]].dtype}",
            hint="convert the weights that they were made from; fp8 and MXFP4 can be read",
        )


def _scales(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the name of the factors of each fp8 weight that has factors."""
    found = {name: name + SCALE for name in infos if name + SCALE in infos}
    plain = {
        name: name + PLAIN_SCALE
        for name, info in infos.items()
        if name.endswith(_WEIGHT)
        and info.dtype.startswith("float8")
        and name + PLAIN_SCALE in infos
    }
    return found | plain


def _block_in(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the shape of fp8 blocks from an untrusted `quantization_config`."""
    size = config.get("weight_block_size") if isinstance(config, Mapping) else 0
    if size is None:
        return BLOCK
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or any(type(one) is not int or one < 1 for one in size)
    ):
        raise FormatError("`config.json`: `weight_block_size` must be two whole numbers above 0")
    return size[0], size[1]


def _sibling(name: str, suffix: str, other: str) -> str:
    return name.removesuffix(suffix) + other
