"""Saves to and loads from a bucket, by Holdfast and others.

Each system is imported when it is used, so that a process has the memory of one alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.storage.streams import PART_BYTES

State = dict[str, Any]


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


def _holdfast_save(url: str, state: State) -> None:
    import holdfast

    holdfast.save(url, state)


def _holdfast_load(url: str, state: State) -> None:
    import holdfast

    holdfast.load(url, state)


def _dcp_save(state: State, writer: Any) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, storage_writer=writer, no_dist=True)


def _dcp_load(state: State, reader: Any) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    load(state, storage_reader=reader, no_dist=True)


def _fsspec(kind: str, url: str) -> Any:
    from torch.distributed.checkpoint import _fsspec_filesystem

    client = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    return getattr(_fsspec_filesystem, kind)(url, client_kwargs=client)


def _connector(kind: str, url: str) -> Any:
    from s3torchconnector import S3ClientConfig, dcp

    # It takes the endpoint from AWS_ENDPOINT_URL_S3.
    config = S3ClientConfig(force_path_style=True)
    return getattr(dcp, kind)(os.environ["AWS_REGION"], f"{url}/", s3client_config=config)


@dataclass(frozen=True, slots=True)
class System:
    """How a library saves and loads."""

    modules: tuple[str, ...]
    """Modules that it needs."""

    save: Callable[[str, State], object]
    load: Callable[[str, State], object]
    """Loads into the memory of the state."""


SYSTEMS: dict[str, System] = {
    "plain obstore": System(("obstore",), _plain_save, _plain_load),
    "holdfast": System(("obstore",), _holdfast_save, _holdfast_load),
    "dcp, fsspec": System(
        ("s3fs",),
        lambda url, state: _dcp_save(state, _fsspec("FsspecWriter", url)),
        lambda url, state: _dcp_load(state, _fsspec("FsspecReader", url)),
    ),
    "dcp, s3torchconnector": System(
        ("s3torchconnector", "tenacity"),
        lambda url, state: _dcp_save(state, _connector("S3StorageWriter", url)),
        lambda url, state: _dcp_load(state, _connector("S3StorageReader", url)),
    ),
}
"""Systems by name, the one that the others are compared with first."""
