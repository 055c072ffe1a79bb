"""Where a conversion goes: a folder or file that is absent until it is whole."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from holdfast.catalog.catalog import Catalog
from holdfast.catalog.sweep import execute, plan_sweep
from holdfast.convert.stream import Advance, Output, Outputs, read_ahead
from holdfast.engine.index import columns, index_of
from holdfast.engine.plan import Placed, Plan, TensorOffer
from holdfast.engine.publish import Facts, publish
from holdfast.engine.root import open_root
from holdfast.engine.spans import amount
from holdfast.engine.write import image_of, lay_out, write
from holdfast.errors import ExistsError, HoldfastError, StorageError
from holdfast.format import torchfile
from holdfast.format.manifest import Kind, Path
from holdfast.format.names import Aside, step_of
from holdfast.format.safetensors import INDEX
from holdfast.hf.assets import beside_weights, config_bytes
from holdfast.hf.folder import CONFIG
from holdfast.hf.shards import shard
from holdfast.storage.store import Buffer, ReadStore, Writer

Values = Mapping[str, tuple[Path, bytes]]
"""What is not a tensor: path and bytes, in the form that the target keeps."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place to convert to."""

    catalog: Catalog
    """Of the folder that it lies in."""

    name: str

    @property
    def where(self) -> str:
        return self.catalog.where(self.name)


def open_target(path: str, *, overwrite: bool) -> Target:
    """The place at `path`, made ready: what a killed conversion left there is removed.

    Raises:
        ExistsError: something is there, and `overwrite` is false.
        UsageError: no place that can be written to.
    """
    catalog, name = open_root(path)
    catalog.store.make_folder("")
    execute(catalog.store, plan_sweep(catalog.store.list(), only=name))
    there = catalog.store.list()
    taken = name in there or (f"{name}/" in there and catalog.store.list(name))
    if taken and not overwrite:
        raise ExistsError(
            f"`{catalog.where(name)}` exists already",
            hint="choose another place, or pass `--overwrite` to replace it",
        )
    return Target(catalog, name)


@contextmanager
def _attempt(target: Target, nbytes: int) -> Iterator[Aside]:
    """A folder that no reader looks at; gone if what is done in it fails."""
    free = target.catalog.store.free_bytes()
    if free is not None and nbytes > free:
        raise StorageError(
            f"`{target.where}` needs {amount(nbytes)}, {amount(free)} are free",
            hint="free some space (df -h), or convert to another disk",
        )
    attempt = target.catalog.begin(target.name)
    try:
        yield attempt
    except BaseException:
        with suppress(HoldfastError):
            target.catalog.discard(attempt)
        raise


# ----------------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, slots=True)
class HubFiles:
    """What an export has beside its weights."""

    config: Mapping[str, Any]
    """Of `config.json`, before it is told the dtype of these weights."""

    assets: tuple[ReadStore, str] | None
    """A folder whose other files come along."""


def write_hub(
    target: Target, outputs: Outputs, beside: HubFiles, max_shard_bytes: int, advance: Advance
) -> int:
    """Write a Hugging Face folder. Returns its bytes, without what lies beside the weights."""
    infos = {name: (output.dtype, output.shape) for name, output in outputs.items()}
    export = shard(infos, max_shard_bytes)
    store = target.catalog.store
    order = [name for image in export.files.values() for name in image.tensors]
    with _attempt(target, export.nbytes) as attempt:
        wanted = [(outputs[name], region) for name in order for region in outputs[name].regions()]
        with read_ahead(wanted, advance) as take:
            for file, image in export.files.items():
                with store.create(f"{attempt}/{file}", image.nbytes) as writer:
                    writer.write(0, [image.header])
                    for name, span in image.tensors.items():
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
    execute(store, plan_sweep(store.list(), only=target.name))
    return export.nbytes


def _write_small(target: Target, attempt: Aside, file: str, data: bytes) -> None:
    store = target.catalog.store
    folder, _, _ = file.rpartition("/")
    if folder and f"{folder}/" not in store.list(str(attempt)):
        store.make_folder(f"{attempt}/{folder}")
    with store.create(f"{attempt}/{file}", len(data)) as writer:
        writer.write(0, [data])
    if folder:
        store.sync(f"{attempt}/{folder}")


def _write_tensor(writer: Writer, offset: int, output: Output, take: Callable[[], Buffer]) -> None:
    for _ in output.regions():
        block = take()
        writer.write(offset, [block])
        offset += len(block)


# ------------------------------------------------------------------------------------------ .pt


def write_torch_file(target: Target, outputs: Outputs, values: Values, advance: Advance) -> int:
    """Write a `.pt` file as `torch.save` nests it. Returns its bytes."""
    image = torchfile.lay_out(
        {
            name: torchfile.NewTensor(output.path, output.dtype, output.shape, output.same_as)
            for name, output in outputs.items()
        },
        values,
    )
    store, name = target.catalog.store, target.name
    with _attempt(target, image.nbytes) as attempt:
        wanted = [(outputs[n], region) for n in image.tensors for region in outputs[n].regions()]
        with (
            read_ahead(wanted, advance) as take,
            store.create(f"{attempt}/{name}", image.nbytes) as writer,
        ):
            for offset, frame in image.frames:
                writer.write(offset, [frame])
            for one, span in image.tensors.items():
                _write_tensor(writer, span.offset, outputs[one], take)
        store.sync(str(attempt))
        if name in store.list() or f"{name}/" in store.list():
            store.remove(name)
        store.rename(f"{attempt}/{name}", name)
        store.remove(str(attempt))
    return image.nbytes


# ----------------------------------------------------------------------------------------- a step


def write_step(
    target: Target,
    outputs: Outputs,
    values: Values,
    facts: Facts,
    advance: Advance,
) -> int:
    """Write a step as a save does, checksums and `.metadata` included. Returns its bytes."""
    whole = _plan(outputs, values)
    wanted = [(outputs[p.name], region) for p in whole.tensors for region in p.regions_of(0)]
    items = lay_out(
        [(p.name, p.tensor.dtype, region) for p in whole.tensors for region in p.regions_of(0)]
    )
    image = image_of(0, items, {name: container for name, (_, container) in values.items()})
    with _attempt(target, image.nbytes) as attempt:
        with read_ahead(wanted, advance) as take:
            store = target.catalog.store
            receipt = write(store, str(attempt), image, lambda _name, _region: take())
        index = index_of(whole, [columns(items)])
        return publish(attempt, [receipt], index, facts, target.catalog)


def _plan(outputs: Outputs, values: Values) -> Plan:
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
        tensor = TensorOffer(output.dtype, output.shape, output.path)
        placed.append(Placed(name, tensor, start, stop, np.zeros(len(regions), np.int64)))
    return Plan(placed, {name: (0, path) for name, (path, _) in values.items()}, aliases)


def facts_of(target: Target, kind: Kind, step: int | None, model: Mapping[str, Any]) -> Facts:
    """What the manifest of a step says; the name of the target knows better which step it is."""
    named = step_of(target.name)
    step = step if named is None else named
    return Facts(step, kind, {"world_size": 1}, _versions(), model=model)


def _versions() -> dict[str, str]:
    return {"holdfast": version("holdfast"), "python": platform.python_version()}


def nbytes_of(outputs: Outputs) -> int:
    """Of all elements that are written."""
    return sum(output.nbytes for output in outputs.values() if not output.same_as)
