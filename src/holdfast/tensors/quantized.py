"""Quantized tensors seen as what they stand for: fp8 in blocks, MXFP4.

After DeepSeek V3's `README_WEIGHTS.md` (each block of 128 x 128 elements of `X.weight` has one
factor in `X.weight_scale_inv`) and the OCP Microscaling Formats specification 1.0 (each 32 elements
of 4 bits share an exponent of 8; gpt-oss keeps them in `X_blocks` and `X_scales`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from holdfast.errors import FormatError
from holdfast.format.region import Region
from holdfast.tensors.lazy import TensorInfo, Tensors
from holdfast.tensors.numbers import Array, Floats, floats

KEPT = "bfloat16"
"""What these models were trained in: dequantized, they are stored so unless asked for otherwise."""

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"

BLOCK = (128, 128)
"""Elements of fp8 that share a factor, where the configuration does not say."""

_FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OF_BYTE = np.array(
    [
        [(-1.0 if nibble & 8 else 1.0) * _FOUR_BITS[nibble & 7] for nibble in (b & 15, b >> 4)]
        for b in range(256)
    ],
    np.float32,
)
"""The two elements in each byte, that in the lower half first."""

GROUP = 32
"""Elements of MXFP4 that share an exponent: 16 bytes."""


class Dequantized:
    """Tensors with every quantized one in the place of its parts."""

    def __init__(self, source: Tensors, config: Mapping[str, Any]) -> None:
        """`config`: the `quantization_config` of the folder, where there is one.

        Raises:
            FormatError: parts that do not fit one another, or a way to quantize that is not known.
        """
        self._source = source
        self._block = _block_in(config)
        self.held: dict[str, TensorInfo] = {}
        self.num_quantized = 0
        held, wrong = source.held, []
        for name, found in held.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in held:
                continue
            if name.endswith(SCALES) and _other(name, SCALES, BLOCKS) in held:
                continue
            shape = found.shape
            if name + SCALE in held:
                wrong += self._check_fp8(name)
            elif name.endswith(BLOCKS) and _other(name, BLOCKS, SCALES) in held:
                wrong += self._check_mxfp4(name)
                name, shape = name.removesuffix(BLOCKS), _unpacked(shape)
            else:
                if found.dtype.startswith(("float8", "float4")):
                    wrong.append(f"`{name}` is {found.dtype}, without its `{name}{SCALE}`")
                self.held[name] = found
                continue
            self.num_quantized += 1
            self.held[name] = TensorInfo("float32", shape, KEPT)
        if wrong:
            raise FormatError(
                "quantized in a way that is not known:\n  " + "\n  ".join(wrong),
                hint="fp8 in blocks (DeepSeek) and MXFP4 (gpt-oss) can be read",
            )

    def read(self, name: str, region: Region) -> Array:
        if name + BLOCKS in self._source.held:
            return self._read_mxfp4(name, region)
        if name + SCALE in self._source.held:
            return self._read_fp8(name, region)
        return self._source.read(name, region)

    def _read_fp8(self, name: str, region: Region) -> Floats:
        bits = self._source.read(name, region)
        first = tuple(start // size for start, size in zip(region.start, self._block, strict=True))
        last = tuple(-(-stop // size) for stop, size in zip(region.stop, self._block, strict=True))
        scale = self._source.held[name + SCALE].dtype
        factors = floats(self._source.read(name + SCALE, Region(first, last)), scale)
        rows, columns = (
            np.arange(start, stop) // size - block
            for start, stop, size, block in zip(
                region.start, region.stop, self._block, first, strict=True
            )
        )
        values = floats(bits, self._source.held[name].dtype)
        for block in range(factors.shape[0]):
            # Row by row of blocks: the factors of all elements at once would be as large as they.
            values[rows == block] *= factors[block][columns]
        return values

    def _read_mxfp4(self, name: str, region: Region) -> Array:
        """Experts lie row by row in groups; the tensor that they stand for is the transpose."""
        (e0, k0, r0), (e1, k1, r1) = region.start, region.stop
        g0, g1 = k0 // GROUP, -(-k1 // GROUP)
        box = Region((e0, r0, g0, 0), (e1, r1, g1, GROUP // 2))
        blocks = self._source.read(name + BLOCKS, box)
        scales = self._source.read(name + SCALES, Region((e0, r0, g0), (e1, r1, g1)))
        values: Floats = _OF_BYTE[blocks]
        np.ldexp(values, scales.astype(np.int32)[..., None, None] - 127, out=values)
        rows = values.reshape(e1 - e0, r1 - r0, (g1 - g0) * GROUP)
        return rows[:, :, k0 - g0 * GROUP : k1 - g0 * GROUP].transpose(0, 2, 1)

    def _check_fp8(self, name: str) -> list[str]:
        weight, scale = self._source.held[name], self._source.held[name + SCALE]
        if len(weight.shape) == len(self._block) == 2:
            wanted = tuple(-(-n // size) for n, size in zip(weight.shape, self._block, strict=True))
            if scale.shape == wanted and weight.dtype.startswith("float8"):
                return []
        return [
            f"`{name}` is {weight.dtype} {list(weight.shape)}, its `{SCALE}` {list(scale.shape)}, "
            f"blocks are {list(self._block)}"
        ]

    def _check_mxfp4(self, name: str) -> list[str]:
        scales = _other(name, BLOCKS, SCALES)
        found, theirs = self._source.held[name], self._source.held[scales]
        whole = len(found.shape) == 4 and found.shape[3] * 2 == GROUP
        if whole and theirs.shape == found.shape[:3] and found.dtype == theirs.dtype == "uint8":
            return []
        return [
            f"`{name}` is {found.dtype} {list(found.shape)}, `{scales}` {theirs.dtype} "
            f"{list(theirs.shape)}"
        ]


def _block_in(config: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of fp8 that share a factor, as a stranger's configuration has them."""
    found = config.get("weight_block_size") if isinstance(config, Mapping) else 0
    if found is None:
        return BLOCK
    if (
        not isinstance(found, list | tuple)
        or len(found) != 2
        or any(type(size) is not int or size < 1 for size in found)
    ):
        raise FormatError("`config.json`: `weight_block_size` must be two whole numbers above 0")
    return found[0], found[1]


def _other(name: str, suffix: str, other: str) -> str:
    return name.removesuffix(suffix) + other


def _unpacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    experts, rows, groups, _ = (*shape, 0, 0, 0, 0)[:4]
    return (experts, groups * GROUP, rows)
