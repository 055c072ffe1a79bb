"""Choice of the format that a conversion writes, from `--to` and the name of the target."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from holdfast.errors import UsageError

TargetFormat = Literal["dcp", "hf", "torch"]

TORCH = (".pt", ".pth")
"""Suffixes that only files of `torch.save` have. Such files may have any other suffix too."""

TORCH_OR_OTHER = (".bin", ".ckpt", ".tar")
"""Suffixes of both torch's and other programs' files. A target with such a name needs `--to
torch`."""

OTHER = (
    ".gguf .ggml .llamafile .onnx .tflite .pb .keras .h5 .hdf5 .npz .npy .msgpack .pdparams "
    ".mlmodel .mlpackage .engine .nemo .pte .pt2 .pkl .pickle .zip .gz .tgz .zst .json .toml .yaml "
    ".txt .csv .parquet .distcp"
)
"""Suffixes of formats that no conversion writes. A target with such a name is refused."""


def target_format(source: str, target: str, to: TargetFormat | None) -> TargetFormat:
    """Return the format to write: `to` if given, else `torch` if the name of the target ends in
    `.pt` or `.pth`, else `dcp`."""
    suffix = PurePath(target).suffix.lower()
    if suffix == ".safetensors":
        raise UsageError(
            f"`{target}`: safetensors are written as a folder, with `config.json`",
            hint=f"holdfast convert {source} FOLDER --to hf",
        )
    if suffix in TORCH and to not in (None, "torch"):
        raise UsageError(
            f"`{target}` is the name of a file, but `--to {to}` writes a folder",
            hint=f"another name, or `--to torch`: holdfast convert {source} FOLDER --to {to}",
        )
    if suffix in TORCH_OR_OTHER and to != "torch":
        raise UsageError(
            f"`{target}` may be meant as a file of torch, or of another program",
            hint=f"for torch: holdfast convert {source} {target} --to torch",
        )
    if suffix in OTHER.split():
        hint = f"holdfast convert {source} FOLDER --to hf"
        if suffix in (".gguf", ".ggml", ".llamafile"):
            hint += ", then `convert_hf_to_gguf.py` of llama.cpp"
        raise UsageError(
            f"`{target}`: `holdfast convert` cannot write {suffix} files",
            hint=hint,
        )
    return to or ("torch" if suffix in TORCH else "dcp")
