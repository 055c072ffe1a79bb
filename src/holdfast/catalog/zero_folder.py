"""Opens folders of DeepSpeed's ZeRO, in which each rank has its parts of flat vectors."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.catalog.catalog import location
from holdfast.catalog.hf_folder import open_torch_file
from holdfast.errors import FormatError
from holdfast.format.manifest import Manifest
from holdfast.format.torchfile import TorchFile
from holdfast.format.zero import ZERO_MODEL, ZERO_OPTIMIZER, ZeroFiles, join
from holdfast.storage.store import ReadStore


def open_zero_folder(
    store: ReadStore, name: str
) -> tuple[Manifest, tuple[str, ...], Mapping[str, TorchFile]]:
    """Read the pickles of all files of a folder. Returns a manifest of its parameters and buffers,
    notes, and the contents of each file.

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
                hint="DeepSpeed's ds_to_universal.py joins it",
            )
        (models if model else optimizers)[int(match[1] or 0)] = file
    contents = {
        file: open_torch_file(store, name, file)
        for files in (models, optimizers)
        for _, file in sorted(files.items())
    }
    files = ZeroFiles(
        models={file: contents[file] for _, file in sorted(models.items())},
        optimizers={file: contents[file] for _, file in sorted(optimizers.items())},
    )
    manifest, notes = join(files, where=where)
    return manifest, notes, contents
