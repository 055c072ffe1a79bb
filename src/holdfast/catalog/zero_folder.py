"""Opens folders of DeepSpeed's ZeRO, which divides flattened parameters among the ranks."""

from __future__ import annotations

from holdfast.catalog.catalog import location
from holdfast.catalog.hf_folder import open_torch_file
from holdfast.errors import FormatError
from holdfast.format.manifest import Manifest
from holdfast.format.zero import UNIVERSAL_HINT, ZERO_MODEL, ZERO_OPTIMIZER, join
from holdfast.storage.store import ReadStore


def open_zero_folder(store: ReadStore, name: str) -> tuple[Manifest, tuple[str, ...]]:
    """Read the pickles of all files in a folder. Return a manifest of the parameters and buffers in
    the files, and notes.

    Raises:
        FormatError: a file is malformed, or the model is divided in a way that the files do not
            describe.
    """
    where = location(store, name)
    models: dict[int, str] = {}
    optimizers: dict[int, str] = {}
    for file in store.list(name):
        model, optimizer = ZERO_MODEL.fullmatch(file), ZERO_OPTIMIZER.fullmatch(file)
        match = model or optimizer
        if match is None:
            continue
        if int(match[2]):
            raise FormatError(
                f"`{where}` is a checkpoint of DeepSpeed with tensor or pipeline parallelism, "
                "which its files do not describe",
                hint=UNIVERSAL_HINT,
            )
        (models if model else optimizers)[int(match[1] or 0)] = file
    contents = [
        {file: open_torch_file(store, name, file) for _, file in sorted(files.items())}
        for files in (models, optimizers)
    ]
    return join(contents[0], contents[1], where=where)
