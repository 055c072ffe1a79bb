"""Saving to and loading from a server of S3: `python -m benchmarks.objects`.

The server is the one that `AWS_ENDPOINT_URL` names, and the bucket that in `HOLDFAST_BENCH_BUCKET`.
`plain obstore` moves the same bytes without checkpoints: streams in parts of 8 MiB, four at a time,
and ranges of 8 MiB by 16 threads. Libraries that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from benchmarks.meter import Figure, measure, run_rounds
from benchmarks.options import BenchmarkOptions
from benchmarks.results import Section, measure_parts
from benchmarks.states import llama_like, local_bytes
from holdfast.storage.streams import PART_BYTES

State = dict[str, Any]

METHOD = (
    "{gb:.2f} GB, {count} tensors, one process, a server on the same machine. `cpu_s` is that of "
    "the client; `extra_mib` is its peak memory beside the state."
)


def _bucket() -> str:
    return f"s3://{os.environ['HOLDFAST_BENCH_BUCKET']}"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _parts(state: State) -> list[memoryview]:
    """The bytes of all tensors, in windows of a part."""
    views = [_bytes_of(tensor) for tensor in state.values()]
    return [v[i : i + PART_BYTES] for v in views for i in range(0, len(v), PART_BYTES)]


def _plain(url: str) -> Any:
    from obstore.store import from_url

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return from_url(url, config={"endpoint": endpoint}, client_options={"allow_http": True})


def _plain_save(url: str, state: State) -> None:
    import obstore

    options: dict[str, Any] = {"use_multipart": True, "chunk_size": PART_BYTES}
    obstore.put(_plain(url), "data", iter(_parts(state)), max_concurrency=4, **options)


def _plain_load(url: str, state: State) -> None:
    import obstore

    store, starts, position = _plain(url), [], 0
    parts = _parts(state)
    for part in parts:
        starts.append(position)
        position += len(part)

    def read(start: int, part: memoryview) -> None:
        part[:] = memoryview(obstore.get_range(store, "data", start=start, length=len(part)))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(read, starts, parts))


def _fsspec_options() -> dict[str, Any]:
    return {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}


def _fsspec_save(url: str, state: State) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    writer = FsspecWriter(url, client_kwargs=_fsspec_options())
    dcp_save(state, storage_writer=writer, no_dist=True)


def _fsspec_load(url: str, state: State) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    reader = FsspecReader(url, client_kwargs=_fsspec_options())
    dcp_load(state, storage_reader=reader, no_dist=True)


def _connector(kind: str, url: str) -> Any:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector import dcp as connector

    endpoint, region = os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_REGION"]
    os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
    config = S3ClientConfig(force_path_style=True)
    return getattr(connector, kind)(region, url, s3client_config=config)


SYSTEMS: dict[str, tuple[str, Callable[[str, State], object], Callable[[str, State], object]]] = {
    "plain obstore": ("obstore", _plain_save, _plain_load),
    "holdfast": (
        "obstore",
        lambda url, state: holdfast.save(f"{url}/step-1", state),
        lambda url, state: holdfast.load(f"{url}/step-1", state),
    ),
    "dcp, fsspec": ("s3fs", _fsspec_save, _fsspec_load),
    "dcp, s3torchconnector": (
        "s3torchconnector",
        lambda url, state: dcp_save(
            state, storage_writer=_connector("S3StorageWriter", f"{url}/"), no_dist=True
        ),
        lambda url, state: dcp_load(
            state, storage_reader=_connector("S3StorageReader", f"{url}/"), no_dist=True
        ),
    ),
}
"""Module that a system needs, and how it saves and loads."""


def _measured(options: BenchmarkOptions, name: str, title: str, *, loads: bool) -> Section:
    state: State = dict(llama_like(options.nbytes))
    numbers = count()
    installed = {n: s for n, s in SYSTEMS.items() if importlib.util.find_spec(s[0])}
    if loads:
        for system, (_, save, _) in installed.items():
            save(f"{_bucket()}/loads/{system.replace(' ', '-')}", state)

    def run(system: str) -> Figure:
        _, save, load = installed[system]
        if not loads:
            url = f"{_bucket()}/saves/{next(numbers)}"
            return measure(lambda: save(url, state))
        target = {key: torch.empty_like(tensor) for key, tensor in state.items()}
        for tensor in target.values():
            tensor.fill_(0)
        figure = measure(lambda: load(f"{_bucket()}/loads/{system.replace(' ', '-')}", target))
        assert all(torch.equal(target[key], state[key]) for key in state), system
        return figure

    systems = {system: partial(run, system) for system in installed}
    figures = run_rounds(systems, options.rounds)
    nbytes = local_bytes(state)
    method = METHOD.format(gb=nbytes / 1e9, count=len(state))
    return Section(name, title, method, figures, {"nbytes": nbytes})


def saving(options: BenchmarkOptions, folder: Path) -> Section:  # noqa: ARG001 - no disk
    """Measure saves."""
    return _measured(options, "objects_saving", "Saving to an object store", loads=False)


def loading(options: BenchmarkOptions, folder: Path) -> Section:  # noqa: ARG001 - no disk
    """Measure loads into memory that exists, and compare every tensor."""
    return _measured(options, "objects_loading", "Loading from an object store", loads=True)


if __name__ == "__main__":
    measure_parts(__doc__, {"saving": saving, "loading": loading})
