"""G13: a conversion uses memory for a few blocks, whatever the size of the model."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.hf.families import family_of
from holdfast.hf.family import mapping_of

MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1024,
    "num_experts": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 106496,
    "tie_word_embeddings": True,
}
"""540 MB in bfloat16; one tensor has 436 MB of them."""

LIMIT_BYTES = 300 << 20

SCRIPT = """
import re, resource, sys
from pathlib import Path
from holdfast.cli import convert, terminal
from holdfast.convert import convert as _, values
import torch
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + {limit}, size + {limit}))
sys.exit(convert.run(sys.argv[1:]))
"""


def sparse_folder(folder: Path) -> Path:
    """Write a folder of sparse files: all tensors are zeros, and take no space on disk."""
    mapping = mapping_of(family_of(MODEL, where="test"), MODEL)
    header, at = {}, 0
    for name in mapping.names("hf"):
        nbytes = 2
        for size in mapping.shape("hf", name):
            nbytes *= size
        shape = mapping.shape("hf", name)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder


@pytest.mark.parametrize("to", ["dcp", "hf", "torch"])
def test_peak_memory_is_bounded(to: str, tmp_path: Path) -> None:
    """G13: the address space may grow by 300 MiB, less than the largest tensor takes. Method:
    RLIMIT_AS, set after all imports; a single malloc arena, since glibc reserves 64 MiB of address
    space for each thread's."""
    source, target = sparse_folder(tmp_path / "hf"), tmp_path / "target"
    arguments = [
        str(source),
        str(target),
        "--to",
        to,
        "--dtype",
        "float32" if to == "dcp" else "bfloat16",
    ]
    script = SCRIPT.format(limit=LIMIT_BYTES)
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "tensors" in ran.stdout
