"""Targets of a conversion: a folder or file that appears only when it is complete."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.open_any import is_checkpoint
from holdfast.catalog.paths import full_path, split_path
from holdfast.catalog.replaceable import is_file, special_file, why_not_replaceable
from holdfast.catalog.temporary import TemporaryFolder
from holdfast.catalog.upload import write_file
from holdfast.convert.stream import Advance, Output, Outputs, read_ahead
from holdfast.errors import ExistsError, NotFoundError, StorageError, UsageError
from holdfast.format import torchfile
from holdfast.format.manifest import Kind, Manifest, Path
from holdfast.format.names import HiddenFolder, check_name, hidden_folder_of, step_name, step_of
from holdfast.format.structure import Node
from holdfast.hf.assets import write_small
from holdfast.hf.shards import ExportLayout
from holdfast.planning.file_layout import lay_out, lay_out_file
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import GlobalPlan, LocalTensor, TensorChunks
from holdfast.saving.publish import publish
from holdfast.saving.write import write
from holdfast.spelling import spelled_bytes
from holdfast.storage.continuing import Continuing
from holdfast.storage.opening import folder_store, is_url, store_to_save
from holdfast.storage.store import (
    Addressing,
    Buffer,
    Creating,
    FileWriter,
    FolderStore,
    ReadStore,
    Replacing,
    Store,
)

Values = Mapping[str, tuple[Path, bytes]]
"""Path and bytes of each value, by name, in the form that the target needs."""


@dataclass(frozen=True, slots=True)
class ConvertTarget:
    """A folder or file to convert to."""

    catalog: Catalog
    """Catalog of the folder that contains the target."""

    store: Store
    """Store of the folder that contains the target."""

    name: str
    overwrite: bool
    """Whether an existing checkpoint is replaced."""

    file: bool
    """Whether the target is a file, not a folder."""

    files: Continuing | None
    """Creator of files in `store` that completes files of a killed conversion; None if the store
    cannot change files."""

    @property
    def where(self) -> str:
        return self.catalog.where(self.name)

    def files_at(self, attempt: HiddenFolder) -> str:
        """Return the path or URL below which other programs find the files of this attempt, once it
        is published."""
        if isinstance(self.store, Addressing):
            return self.store.address(str(attempt))
        return self.where

    @property
    def creating(self) -> Creating:
        """Creator of the target's files: `files` or, without it, `store`."""
        return self.store if self.files is None else self.files

    @property
    def replaces_folder(self) -> bool:
        return self.overwrite and not self.file


def open_target(
    path: str, *, overwrite: bool, sources: Sequence[str] = (), file: bool = False
) -> ConvertTarget:
    """Prepare to write a conversion to `path`: see `target_in`.

    `sources`: paths that the conversion reads. The target must not be, contain or be inside any of
    them.
    """
    full = full_path(path)
    for source in sources:
        _check_apart(full, source)
    folder, name = split_path(full)
    check_name(name, full)
    return target_in(store_to_save(folder), name, overwrite=overwrite, file=file)


def target_in(store: Store, name: str, *, overwrite: bool, file: bool = False) -> ConvertTarget:
    """Prepare to write a conversion to the file or folder `name` in a store: clean up, and check
    that the name is free or may be replaced. `overwrite`: whether an existing checkpoint may be
    replaced. `file`: whether the target is a file, not a folder.

    If the store can change files, attempts of killed conversions are kept, so that this conversion
    can continue them.
    """
    catalog = Catalog(store)
    store.make_folder("")
    if file and not isinstance(store, FolderStore | Replacing):
        raise UsageError(
            f"`{store.url}` cannot replace single files",
            hint=f"convert to a file of this machine, or to a folder: `{store.url}/{name}-dcp`",
        )
    files = Continuing(store) if isinstance(store, FolderStore) else None
    attempts = {str(attempt) for attempt in _attempts(store, name)} if files else set()
    actions = plan_cleanup(store.list(), only=name)
    execute(store, [action for action in actions if action.folder not in attempts])
    is_empty_folder = not file and f"{name}/" in store.list() and not store.list(name)
    if not is_empty_folder:
        hint = "choose another target, or pass `--overwrite` to replace it"
        why_not = _why_not_replaceable_by_file if file else why_not_replaceable
        catalog.check_free(name, replace=overwrite, hint=hint, why_not=why_not)
    replace_existing = overwrite or is_empty_folder
    return ConvertTarget(catalog, store, name, replace_existing, file, files)


def _why_not_replaceable_by_file(store: ReadStore, name: str) -> str | None:
    """Return the reason why a file may not replace the folder or file `name`; None if it may."""
    if not is_file(store, name):
        return "it is a folder, and a file was to take its place"
    if is_checkpoint(store, name):
        return None
    return special_file(store, name) or "it is a file, and no checkpoint"


def _check_apart(target: str, source: str) -> None:
    """Check that a target is not, does not contain and is not inside a source."""
    if is_url(source) or is_url(target):
        if f"{target}/".startswith(f"{source.rstrip('/')}/"):
            raise UsageError(f"`{target}` cannot be written: the conversion reads `{source}`")
        return
    # Resolve the parent only: a target that is a link is replaced, not the folder behind it.
    above, _, name = target.rpartition("/")
    paths = f"{os.path.realpath(above or '/')}/{name}", os.path.realpath(source)
    if os.path.commonpath(paths) in paths:
        raise UsageError(
            f"`{target}` cannot be written: the conversion reads `{source}`",
            hint="choose a target outside of it",
        )


@contextmanager
def _attempt(target: ConvertTarget, sizes: Mapping[str, int]) -> Iterator[HiddenFolder]:
    """Yield the attempt into which files of these sizes are written: a new one, or one that a
    killed conversion has left.

    The attempt is aborted if the `with` block raises an `Exception`, but not if the process is
    interrupted.
    """
    store, catalog = target.store, target.catalog
    attempt = _taken_over(target, sizes)
    try:
        existing = [] if attempt is None else store.list(str(attempt))
        nbytes = sum(sizes[file] for file in sizes if file not in existing)
        free = store.free_bytes()
        if free is not None and nbytes > free:
            raise StorageError(
                f"`{target.where}` needs {spelled_bytes(nbytes)}, {spelled_bytes(free)} are free",
                hint="free some space (df -h), or convert to another disk",
            )
        if attempt is None:
            attempt = catalog.begin(target.name, replace=target.replaces_folder)
        try:
            yield attempt
        except Exception:
            catalog.abort(attempt)
            raise
    finally:
        if attempt is not None:
            catalog.release(attempt)


def _taken_over(target: ConvertTarget, sizes: Mapping[str, int]) -> HiddenFolder | None:
    """Take over the attempt of a killed conversion to this target. Return None if there is none.

    Files in the attempt with other names or sizes are deleted. Further attempts are deleted too.
    """
    store, catalog, taken = target.store, target.catalog, None
    for attempt in _attempts(store, target.name) if target.files else ():
        try:
            is_held = catalog.hold(attempt, replace=target.replaces_folder and taken is None)
        except NotFoundError:
            continue  # The conversion that wrote the attempt has just finished.
        if is_held is False:
            if taken is not None:
                catalog.release(taken)
            raise ExistsError(
                f"`{target.where}` is being written by another conversion or save",
                hint="wait for it, or choose another target",
            )
        if taken is not None or is_held is None:
            catalog.abort(attempt)
            continue
        taken = attempt
        for name in store.list(str(attempt)):
            if name not in sizes or store.size(f"{attempt}/{name}") != sizes[name]:
                store.remove(f"{attempt}/{name.rstrip('/')}")
    return taken


def _attempts(store: Store, name: str) -> list[HiddenFolder]:
    """Return the attempts that unfinished conversions and saves to the target `name` have left."""
    asides = [
        hidden_folder_of(folder.rstrip("/")) for folder in store.list() if folder.endswith("/")
    ]
    return [aside for aside in asides if aside and (aside.role, aside.name) == ("attempt", name)]


def write_hf(
    target: ConvertTarget,
    outputs: Outputs,
    export: ExportLayout,
    contents: Iterable[tuple[str, bytes]],
    advance: Advance,
) -> tuple[int, str]:
    """Write a Hugging Face folder. Returns the size of its weights in bytes, and the path or URL
    below which other programs find its files.

    `outputs`: tensors to write. `export`: the files to divide them among. `contents`: name and
    bytes of each file besides the weights.
    """
    order = [outputs[name] for layout in export.files.values() for name in layout.tensors]
    sizes = {file: layout.nbytes for file, layout in export.files.items()}
    with _attempt(target, sizes) as attempt:
        with read_ahead(order, advance) as take:
            for file, layout in export.files.items():
                with target.creating.create(f"{attempt}/{file}", layout.nbytes) as writer:
                    writer.write(0, [layout.header])
                    for name, span in layout.tensors.items():
                        _write_tensor(writer, span.offset, outputs[name], take)
        write_small(target.store, target.creating, str(attempt), contents)
        target.catalog.publish(attempt)
    target.catalog.clean_up(target.name)
    return export.nbytes, target.files_at(attempt)


def _write_tensor(
    writer: FileWriter, offset: int, output: Output, take: Callable[[], Buffer]
) -> int:
    """Write a tensor at `offset` of a file, block by block. Returns its CRC-32. `take`: function
    that returns the next block."""
    crc32 = 0
    for _ in output.regions():
        block = take()
        crc32 = zlib.crc32(block, crc32)
        writer.write(offset, [block])
        offset += len(block)
    return crc32


def write_torch_file(
    target: ConvertTarget, outputs: Outputs, values: Values, advance: Advance
) -> int:
    """Write a `.pt` file, with dicts that are nested by the paths of the tensors and values.
    Returns its size in bytes."""
    tensors = {
        name: torchfile.NewTensor(output.path, output.dtype, output.shape, output.same_as)
        for name, output in outputs.items()
    }
    layout = torchfile.lay_out(tensors, values)
    store, file = target.store, target.name
    if not isinstance(store, FolderStore):
        return _write_in_store(target, outputs, values, advance)
    with _attempt(target, {file: layout.nbytes}) as attempt:
        with (
            read_ahead([outputs[name] for name in layout.tensors], advance) as take,
            target.creating.create(f"{attempt}/{file}", layout.nbytes) as writer,
        ):
            crc32s = {
                name: _write_tensor(writer, span.offset, outputs[name], take)
                for name, span in layout.tensors.items()
            }
            # Write the bytes around the tensors last: they contain the checksums of the tensors.
            for offset, frame in layout.frames(crc32s):
                writer.write(offset, [frame])
        store.sync(str(attempt))
        # Both calls are atomic: readers find the old file or the new one.
        if target.overwrite and file in store.list():
            store.replace_file(f"{attempt}/{file}", file)
        else:
            store.rename(f"{attempt}/{file}", file)
        store.remove(str(attempt))
    return layout.nbytes


def _write_in_store(
    target: ConvertTarget, outputs: Outputs, values: Values, advance: Advance
) -> int:
    """Write a `.pt` file to an object store. A local file is written first: a `.pt` file has
    checksums before the bytes that they cover, and an object takes bytes only in order."""
    assert isinstance(target.store, Replacing), "`open_target` refuses others"
    temporary = TemporaryFolder.make()
    try:
        local = target_in(folder_store(temporary.path), target.name, overwrite=False, file=True)
        nbytes = write_torch_file(local, outputs, values, advance)
        creates = target.store.replace if target.overwrite else target.store.create
        with creates(target.name, nbytes) as writer:
            write_file(writer, temporary.path / target.name)
    finally:
        temporary.delete()
    return nbytes


def write_checkpoint(
    target: ConvertTarget,
    outputs: Outputs,
    values: Values,
    facts: Manifest,
    advance: Advance,
    *,
    structure: Mapping[Path, Node] | None,
) -> int:
    """Write a checkpoint as a save does, with checksums and `.metadata`. Returns its size in bytes.
    `facts`: manifest without entries and files."""
    plan = replace(_plan(outputs, values), structure=structure)
    regions = [(placed, region) for placed in plan.tensors for region in placed.regions_of(0)]
    items = lay_out([(placed.name, placed.tensor.dtype, region) for placed, region in regions])
    containers = [([name], container) for name, (_, container) in values.items()]
    layout = lay_out_file(0, items, containers)
    with _attempt(target, {layout.name: layout.nbytes} if layout.nbytes else {}) as attempt:
        with read_ahead([outputs[placed.name] for placed in plan.tensors], advance) as take:
            result = write(target.creating, str(attempt), layout, lambda _: (take(),))
        index = Index(plan, [columns(items)])
        return publish(attempt, [result], index, facts, target.catalog)


def _plan(outputs: Outputs, values: Values) -> GlobalPlan:
    """Return the global plan for a single rank, which writes everything. Each block that is read
    becomes a chunk."""
    placed, aliases = [], {}
    for name, output in outputs.items():
        if output.same_as:
            aliases[name] = (output.same_as, output.path)
            continue
        regions = list(output.regions())
        shape = len(regions), len(output.shape)
        start = np.array([region.start for region in regions], np.int64).reshape(shape)
        stop = np.array([region.stop for region in regions], np.int64).reshape(shape)
        tensor = LocalTensor(output.dtype, output.shape, output.path)
        placed.append(TensorChunks(name, tensor, start, stop, np.zeros(len(regions), np.int64)))
    return GlobalPlan(placed, {name: (0, path) for name, (path, _) in values.items()}, aliases)


def check_number(path: str, kind: Kind, step: int | None) -> None:
    """Check that `path` does not give a full checkpoint the number of another step: a resume would
    load the checkpoint as that step. A model-only checkpoint may have any number."""
    folder, name = split_path(full_path(path))
    if kind != "full" or step is None or step_of(name) in (None, step):
        return
    raise UsageError(
        f"`{path}` is the folder of step {step_of(name)}, and the checkpoint is of step {step}: a "
        "resume would take it for another step",
        hint=f"convert it to `{folder.rstrip('/')}/{step_name(step)}`; or pass `--model-only` to "
        "convert the weights alone, such as to a `step-0` to start from",
    )
