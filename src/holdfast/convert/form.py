"""Which format a conversion writes, by what its target is called and what was asked for."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from holdfast.errors import UsageError

Form = Literal["dcp", "hf", "torch"]

TORCH = (".pt", ".pth")
"""Names of files that torch.save writes; others of its files may be called anything."""

TORCH_TOO = (".bin", ".ckpt", ".tar")
"""Names that torch's files have as well as others, so that they need `--to torch`."""

OTHERS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".llamafile": "llamafile",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow",
    ".keras": "Keras",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".npz": "numpy",
    ".npy": "numpy",
    ".msgpack": "Flax",
    ".pdparams": "PaddlePaddle",
    ".mlmodel": "Core ML",
    ".mlpackage": "Core ML",
    ".engine": "TensorRT",
    ".nemo": "NeMo",
    ".pte": "ExecuTorch",
    ".pt2": "torch.export",
    ".pkl": "pickle",
    ".pickle": "pickle",
    ".zip": "ZIP",
    ".gz": "gzip",
    ".tgz": "tar",
    ".zst": "Zstandard",
    ".json": "JSON",
    ".toml": "TOML",
    ".yaml": "YAML",
    ".txt": "text",
    ".csv": "CSV",
    ".parquet": "Parquet",
    ".distcp": "a step's data",
}
"""Names of files that no conversion writes: a folder of such a name would be taken for one."""


def form_of(source: str, target: str, to: Form | None) -> Form:
    """The format to write: the one asked for, else torch for the name of its files, else dcp.

    Raises:
        UsageError: the target is called as a file of another format.
    """
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
    if suffix in TORCH_TOO and to != "torch":
        raise UsageError(
            f"`{target}` may name a file of torch, or of another program",
            hint=f"for torch: holdfast convert {source} {target} --to torch",
        )
    if suffix in OTHERS:
        advice = f"holdfast convert {source} FOLDER --to hf"
        if suffix in (".gguf", ".ggml", ".llamafile"):
            advice += ", which `convert_hf_to_gguf.py` of llama.cpp takes"
        raise UsageError(
            f"`{target}` names a file of {OTHERS[suffix]}, which is not written here: a step, a "
            "Hugging Face folder and a .pt file are (`--to` dcp, hf, torch)",
            hint=advice,
        )
    return to or ("torch" if suffix in TORCH else "dcp")
