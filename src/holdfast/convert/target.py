"""Where a conversion goes: a folder or file that is absent until it is whole."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.cleanup import execute, plan_cleanup
from holdfast.catalog.hf_folder import CONFIG
from holdfast.convert.stream import Advance, Output, Outputs, read_ahead
from holdfast.errors import ExistsError, HoldfastError, NotFoundError, StorageError, UsageError
from holdfast.format import torchfile
from holdfast.format.manifest import Kind, Path
from holdfast.format.names import Aside, aside_of, check_name, step_name, step_of
from holdfast.format.safetensors import INDEX
from holdfast.format.structure import Node
from holdfast.hf.assets import beside_weights, config_bytes
from holdfast.hf.shards import shard
from holdfast.planning.file_layout import lay_out, lay_out_file
from holdfast.planning.index import Index, columns
from holdfast.planning.write_plan import GlobalPlan, LocalTensor, TensorChunks
from holdfast.release import installed_version
from holdfast.saving.publish import Facts, publish
from holdfast.saving.write import write
from holdfast.spelling import spelled_bytes
from holdfast.storage.continuing import Continuing
from holdfast.storage.opening import folder_store, is_url, local_path
from holdfast.storage.store import AmendableStore, Buffer, ReadStore, Store, Writer

Values = Mapping[str, tuple[Path, bytes]]
"""What is not a tensor: path and bytes, in the form that the target keeps."""


@dataclass(frozen=True, slots=True)
class ConvertTarget:
    """A place to convert to."""

    catalog: Catalog
    """Checkpoints of the folder that it lies in."""

    store: AmendableStore
    """That folder."""

    name: str
    overwrite: bool
    """Whether a checkpoint that is there now is replaced."""

    file: bool
    """Whether it is to be a file, not a folder."""

    files: Continuing
    """Creates files in that folder, where a killed conversion may have begun them."""

    @property
    def where(self) -> str:
        return self.catalog.where(self.name)

    @property
    def replaces_folder(self) -> bool:
        return self.overwrite and not self.file


def open_target(
    path: str, *, overwrite: bool, sources: Sequence[str] = (), file: bool = False
) -> ConvertTarget:
    """The place at `path`, made ready: see `target_in`.

    `sources` are the paths that the conversion reads: the target must be none of them, hold none
    of them and lie in none of them.

    Raises:
        ExistsError: something is there that may not be replaced.
        UsageError: no place that can be written to, or one of the sources.
    """
    full = local_path(path)
    for source in sources:
        _check_apart(full, source)
    folder, _, name = full.rpartition("/")
    if not name:
        raise UsageError(f"`{path}` is no place for a checkpoint: it has no name")
    check_name(name, full)
    return target_in(folder_store(folder or "/"), name, overwrite=overwrite, file=file)


def target_in(
    store: AmendableStore, name: str, *, overwrite: bool, file: bool = False
) -> ConvertTarget:
    """The place `name` in a store, made ready; `file`: it is to be a file, not a folder. What a
    killed conversion left there stays for now: the next one goes on with it.

    Raises:
        ExistsError: something is there, and `overwrite` is false, or it is not one checkpoint.
    """
    catalog = Catalog(store)
    store.make_folder("")
    begun = {str(attempt) for attempt in _attempts(store, name)}
    left = plan_cleanup(store.list(), only=name)
    execute(store, [action for action in left if action.folder not in begun])
    there = store.list()
    empty = not file and f"{name}/" in there and not store.list(name)
    if not empty:
        hint = "choose another place, or pass `--overwrite` to replace it"
        catalog.check_free(name, replace=overwrite, hint=hint, file=file)
    return ConvertTarget(catalog, store, name, overwrite or empty, file, Continuing(store))


def _check_apart(target: str, source: str) -> None:
    """Make sure that a target is not, holds not and lies not in what is read."""
    if is_url(source):
        return
    # Not the target's own last link: that is replaced, and what it leads to stays.
    above, _, name = target.rpartition("/")
    ends = f"{os.path.realpath(above or '/')}/{name}", os.path.realpath(source)
    if os.path.commonpath(ends) in ends:
        raise UsageError(
            f"`{target}` cannot be written: the conversion reads `{source}`",
            hint="choose a place beside it",
        )


@contextmanager
def _attempt(target: ConvertTarget, sizes: Mapping[str, int]) -> Iterator[Aside]:
    """A folder that no reader looks at, to write files of these sizes into: a new one, or that of a
    conversion which was killed, with those of its files that can be gone on with.

    Gone if what is done in it fails, but not if somebody interrupts it.

    Raises:
        ExistsError: another conversion to this place is at work.
    """
    store, catalog = target.store, target.catalog
    attempt = _taken_over(target, sizes)
    try:
        there = [] if attempt is None else store.list(str(attempt))
        nbytes = sum(sizes[file] for file in sizes if file not in there)
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
            with suppress(HoldfastError):
                catalog.discard(attempt)
            raise
    finally:
        if attempt is not None:
            catalog.release(attempt)


def _taken_over(target: ConvertTarget, sizes: Mapping[str, int]) -> Aside | None:
    """What a killed conversion to this place left, with nothing in it but files of these sizes."""
    store, catalog, found = target.store, target.catalog, None
    for attempt in _attempts(store, target.name):
        try:
            mine = catalog.hold(attempt, replace=target.replaces_folder and found is None)
        except NotFoundError:
            continue  # It came to its end a moment ago.
        if mine is False:
            if found is not None:
                catalog.release(found)
            raise ExistsError(
                f"`{target.where}` is being written by another conversion or save",
                hint="wait for it, or choose another place",
            )
        if found is not None or mine is None:
            catalog.discard(attempt)
            continue
        found = attempt
        for name in store.list(str(attempt)):
            if name not in sizes or store.size(f"{attempt}/{name}") != sizes[name]:
                store.remove(f"{attempt}/{name.rstrip('/')}")
    return found


def _attempts(store: Store, name: str) -> list[Aside]:
    """Conversions to this place that have not come to their end."""
    asides = [aside_of(one.rstrip("/")) for one in store.list() if one.endswith("/")]
    return [one for one in asides if one and (one.role, one.name) == ("attempt", name)]


# ----------------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, slots=True)
class HFFiles:
    """What an export has beside its weights."""

    config: Mapping[str, Any]
    """Of `config.json`, before it is told the dtype of these weights."""

    assets: tuple[ReadStore, str] | None
    """A folder whose other files come along."""


def write_hf(
    target: ConvertTarget, outputs: Outputs, beside: HFFiles, max_shard_bytes: int, advance: Advance
) -> int:
    """Write a Hugging Face folder. Returns its bytes, without what lies beside the weights."""
    infos = {name: (output.dtype, output.shape) for name, output in outputs.items()}
    export = shard(infos, max_shard_bytes)
    store, files = target.store, target.files
    order = [name for layout in export.files.values() for name in layout.tensors]
    with _attempt(target, {file: one.nbytes for file, one in export.files.items()}) as attempt:
        wanted = [(outputs[name], region) for name in order for region in outputs[name].regions()]
        with read_ahead(wanted, advance) as take:
            for file, layout in export.files.items():
                with files.create(f"{attempt}/{file}", layout.nbytes) as writer:
                    writer.write(0, [layout.header])
                    for name, span in layout.tensors.items():
                        _write_tensor(writer, span.offset, outputs[name], take)
        small = {CONFIG: config_bytes(beside.config, export.dtype)}
        if beside.assets is not None:
            for file, data in beside_weights(*beside.assets):
                small[file] = data
        for file, data in small.items():
            _write_small(target, attempt, file, data)
        if export.index is not None:
            # Last: a folder without its index is one that nobody takes for whole.
            _write_small(target, attempt, INDEX, export.index)
        target.catalog.publish(attempt)
    execute(store, plan_cleanup(store.list(), only=target.name))
    return export.nbytes


def _write_small(target: ConvertTarget, attempt: Aside, file: str, data: bytes) -> None:
    store = target.store
    folder, _, _ = file.rpartition("/")
    if folder and f"{folder}/" not in store.list(str(attempt)):
        store.make_folder(f"{attempt}/{folder}")
    with target.files.create(f"{attempt}/{file}", len(data)) as writer:
        writer.write(0, [data])
    if folder:
        store.sync(f"{attempt}/{folder}")


def _write_tensor(writer: Writer, offset: int, output: Output, take: Callable[[], Buffer]) -> int:
    """Write the elements of a tensor, block by block. Returns their CRC-32."""
    crc32 = 0
    for _ in output.regions():
        block = take()
        crc32 = zlib.crc32(block, crc32)
        writer.write(offset, [block])
        offset += len(block)
    return crc32


# ------------------------------------------------------------------------------------------ .pt


def write_torch_file(
    target: ConvertTarget, outputs: Outputs, values: Values, advance: Advance
) -> int:
    """Write a `.pt` file as `torch.save` nests it. Returns its bytes."""
    layout = torchfile.lay_out(
        {
            name: torchfile.NewTensor(output.path, output.dtype, output.shape, output.same_as)
            for name, output in outputs.items()
        },
        values,
    )
    store, name = target.store, target.name
    with _attempt(target, {name: layout.nbytes}) as attempt:
        wanted = [(outputs[n], region) for n in layout.tensors for region in outputs[n].regions()]
        with (
            read_ahead(wanted, advance) as take,
            target.files.create(f"{attempt}/{name}", layout.nbytes) as writer,
        ):
            crc32s = {
                one: _write_tensor(writer, span.offset, outputs[one], take)
                for one, span in layout.tensors.items()
            }
            # Last, since they hold the checksums of the elements between them.
            for offset, frame in layout.frames(crc32s):
                writer.write(offset, [frame])
        store.sync(str(attempt))
        _publish_file(target, attempt)
    return layout.nbytes


def _publish_file(target: ConvertTarget, attempt: Aside) -> None:
    """Give a whole file its name; one that is there is replaced at one instant, where it may be."""
    store, name = target.store, target.name
    if target.overwrite and name in store.list():
        store.replace_file(f"{attempt}/{name}", name)
    else:
        store.rename(f"{attempt}/{name}", name)
    store.remove(str(attempt))


# ----------------------------------------------------------------------------------------- a step


def write_step(
    target: ConvertTarget,
    outputs: Outputs,
    values: Values,
    facts: Facts,
    advance: Advance,
    *,
    structure: Mapping[Path, Node] | None,
) -> int:
    """Write a step as a save does, checksums and `.metadata` included. Returns its bytes."""
    whole = replace(_plan(outputs, values), structure=structure)
    wanted = [(outputs[p.name], region) for p in whole.tensors for region in p.regions_of(0)]
    items = lay_out(
        [(p.name, p.tensor.dtype, region) for p in whole.tensors for region in p.regions_of(0)]
    )
    layout = lay_out_file(
        0, items, [([name], container) for name, (_, container) in values.items()]
    )
    with _attempt(target, {layout.name: layout.nbytes} if layout.nbytes else {}) as attempt:
        with read_ahead(wanted, advance) as take:
            result = write(target.files, str(attempt), layout, lambda _: (take(),))
        index = Index(whole, [columns(items)])
        return publish(attempt, [result], index, facts, target.catalog)


def _plan(outputs: Outputs, values: Values) -> GlobalPlan:
    """One rank writes all of it, each tensor in the blocks that it is read in."""
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
    """Make sure that `path` does not give a full checkpoint of `step` the number of another step: a
    resume would take it for that one. Weights alone may have any number.

    Raises:
        UsageError: names the folder that it may be converted to.
    """
    folder, _, name = local_path(path).rpartition("/")
    if kind != "full" or step is None or step_of(name) in (None, step):
        return
    raise UsageError(
        f"`{path}` is the folder of step {step_of(name)}, and the checkpoint holds step {step}: a "
        "resume would take it for another step",
        hint=f"convert it to `{folder}/{step_name(step)}`; or pass `--model-only` to "
        "convert the weights alone, such as to a `step-0` to start from",
    )


def facts_of(
    target: ConvertTarget,
    *,
    kind: Kind,
    step: int | None,
    model: Mapping[str, Any],
    components: Collection[str] | None,
) -> Facts:
    """What the manifest of a checkpoint says. The name of the target decides which step it is: see
    `check_number` for a full checkpoint."""
    named = step_of(target.name)
    step = step if named is None else named
    layout = {"world_size": 1}
    return Facts(step, kind, layout, _versions(), model=model, components=components)


def _versions() -> dict[str, str]:
    return {"holdfast": installed_version(), "python": platform.python_version()}


def nbytes_of(outputs: Outputs) -> int:
    """Of all elements that are written."""
    return sum(output.nbytes for output in outputs.values() if not output.same_as)
