"""The content of golden checkpoints: the same bits on every machine and in every version of
torch."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch


def numbers(*shape: int) -> torch.Tensor:
    """Return sixteenths of small integers, which bfloat16 and float32 represent exactly."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 7919 % 251) - 125).to(torch.float32).div(16).view(shape)


def golden_state() -> dict[str, Any]:
    """Make a state of every kind. One tensor has more than one block of checksums, and few distinct
    bytes, so that its file compresses well."""
    large = torch.zeros((1 << 20) + 4096, dtype=torch.uint8)
    large[:: 1 << 12] = 7
    tied = numbers(6, 4)
    return {
        "model": {
            "float32": numbers(10, 6),
            "rows": numbers(7, 3),
            "columns": numbers(3, 7),
            "bfloat16": numbers(9).to(torch.bfloat16),
            "float8": torch.arange(0, 120, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 15),
            "complex": torch.complex(numbers(4), numbers(2, 4)[1]),
            "int64": torch.arange(-3, 9).view(3, 4),
            "uint16": torch.arange(5).to(torch.uint16),
            "bool": torch.arange(11) % 3 == 0,
            "number": torch.tensor(2.5),
            "empty": torch.zeros(0, 4),
            "tied": tied,
            "again": tied,
        },
        "large": large,
        "list": [numbers(2), {"inner": 3}],
        "values": {
            "step": 12,
            "text": "gr\u00fc\u00df",
            "tuple": (1, 2.5, None),
            "plain": [1, 2, 3],
        },
    }


def golden_structure() -> dict[str, Any]:
    """Make a state whose containers and keys cannot be inferred from its entries."""
    return {
        "keys": {0: numbers(3), -5: {"x": 1}, "text": None, (1, "a"): 2.5, True: b"k"},
        "order": OrderedDict([("z", 1), ("a", numbers(2)), ("m", {})]),
        "count": Counter({3: 2, "a": 1}),
        "default": defaultdict(list, {7: [1], "t": [numbers(2)]}),
        "empty": {"dict": {}, "list": [{}, []], "deep": {"a": {"b": {}}}},
        "rows": [{"i": 1, "x": numbers(2)}, {"i": 2, "x": numbers(3)}],
        "numpy": {
            "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
            "number": np.float32(0.25),
            "list": [1, np.int64(-3), (np.float64(2.5), {2: np.uint8(7)}), b""],
        },
        "tuple": (1, (numbers(2), [numbers(1)])),
        "told": {"w": numbers(2), "list": [numbers(1), {"x": numbers(1)}]},
    }


def golden_trained() -> dict[str, Any]:
    """Make a model and its optimizer, which has slots."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(numbers(2, 3))
        model.bias.copy_(numbers(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": numbers(*parameter.shape),
            "exp_avg_sq": numbers(*parameter.shape).abs(),
        }
    return {"model": model, "optimizer": optimizer}
