"""Write a checkpoint with another version of torch: `python tests/golden/write_by_stock.py FOLDER`.

Does not import Holdfast, and uses only what torch 2.1 had.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed.checkpoint

dcp: Any = torch.distributed.checkpoint
"""Its names come and go from version to version."""


def stock_state() -> dict[str, Any]:
    """Make a state of the kinds that every version can save."""
    return {
        "model": {
            "float32": torch.arange(12.0).view(3, 4) / 16,
            "bfloat16": torch.arange(5).to(torch.bfloat16),
            "int64": torch.arange(4),
            "number": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
        },
        "optimizer": {"step": torch.tensor(7.0), "lr": 0.1, "betas": (0.9, 0.95)},
        "train_state": {"step": 7, "names": ["a", "b"]},
    }


if __name__ == "__main__":
    state, writer = stock_state(), dcp.FileSystemWriter(sys.argv[1])
    if hasattr(dcp, "save") and not torch.__version__.startswith(("2.1.", "2.2.")):
        dcp.save(state, storage_writer=writer)
    else:
        dcp.save_state_dict(state, writer, no_dist=True)
