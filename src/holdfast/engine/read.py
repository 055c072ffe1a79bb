"""Bytes of a checkpoint into tensors: only the ranges that are wanted, each block checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import torch

from holdfast.engine.reshard import Part, moves, parts
from holdfast.engine.source import HINT, WINDOW_BYTES, ChunkData, Source
from holdfast.errors import DamagedError
from holdfast.format.dtypes import dtype_of
from holdfast.format.manifest import Chunk, Span, TensorEntry
from holdfast.format.region import Region
from holdfast.format.torchzip import contiguous_strides, locate
from holdfast.state.shard import Piece

THREADS_MAX = 4


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A tensor to fill: where its pieces lie in the stored one, and the memory that they go to."""

    name: str
    pieces: Sequence[Piece]
    local: torch.Tensor


def read_tensors(source: Source, wanted: Sequence[Wanted]) -> int:
    """Fill every wanted tensor. Returns the bytes read.

    Files are read in the order of their bytes, by a few threads; the first error ends them all.

    Raises:
        DamagedError: bytes that are not those that were written, or not there.
    """
    jobs: list[tuple[str, int, Callable[[], int]]] = []
    for want in wanted:
        entry = source.manifest.tensors[want.name]
        for piece in want.pieces:
            for move in moves(want.name, entry, piece.region):
                at = piece.local_of(move.region)
                target = want.local[at.slices()] if want.local.ndim else want.local
                work = partial(
                    _read_move, source, want.name, entry, move.chunk, move.region, target
                )
                jobs.append((move.chunk.file, move.chunk.item.offset, work))
    jobs.sort(key=lambda job: job[:2])
    return sum(_run([work for _, _, work in jobs]))


def _run(jobs: Sequence[Callable[[], int]]) -> list[int]:
    threads = min(THREADS_MAX, len(jobs))
    if threads < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
        futures = [pool.submit(job) for job in jobs]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        return [future.result() for future in futures if future in done]


def _read_move(
    source: Source,
    name: str,
    entry: TensorEntry,
    chunk: Chunk,
    region: Region,
    target: torch.Tensor,
) -> int:
    """Bring one region of one chunk into `target`, which has its shape."""
    itemsize = dtype_of(entry.dtype).itemsize
    nbytes = chunk.region.num_elements * itemsize
    dtype: torch.dtype = getattr(torch, entry.dtype)
    box = region.within(chunk.region)
    shape, strides = chunk.region.shape, contiguous_strides(chunk.region.shape)
    offset, crc32 = chunk.data_offset, 0
    if offset is None:
        stored = locate(
            partial(_fetch, source, chunk.file), chunk.item, where=f"{chunk.file}:{name}"
        )
        if (stored.dtype, stored.shape) != (entry.dtype, shape):
            raise DamagedError(
                f"`{source.url}/{chunk.file}`: `{name}` is {stored.dtype} {list(stored.shape)} in "
                f"its file, {entry.dtype} {list(shape)} in the index",
                hint=HINT,
            )
        offset, crc32 = stored.data.offset, stored.crc32
        if stored.strides != strides and nbytes > itemsize:
            # As a transposed parameter is kept. Rare: read the chunk whole, then pick.
            whole = torch.empty(stored.data.nbytes // itemsize, dtype=dtype)
            data = ChunkData(source, name, chunk.file, Span(offset, whole.nbytes), None)
            if crc32:
                data = data.with_crc32(crc32)
            data.read(0, whole.nbytes, _memory(whole))
            data.finish()
            target.copy_(whole.as_strided(shape, stored.strides)[box.slices()])
            return whole.nbytes
    checksums = source.checksums(chunk, nbytes)
    data = ChunkData(source, name, chunk.file, Span(offset, nbytes), checksums)
    if crc32 and box == Region.whole(shape):
        data = data.with_crc32(crc32)
    done = 0
    for part in parts(box, shape, itemsize, WINDOW_BYTES):
        done += _read_part(data, part, dtype, strides, target)
    data.finish()
    return done


def _read_part(
    data: ChunkData, part: Part, dtype: torch.dtype, strides: tuple[int, ...], target: torch.Tensor
) -> int:
    into = target[part.box.slices()] if target.ndim else target
    plain = into.is_cpu and into.is_contiguous() and not (into.is_conj() or into.is_neg())
    if part.contiguous and plain and into.dtype == dtype:
        return data.read(part.start, part.stop, _memory(into))
    if part.contiguous and part.stop - part.start > WINDOW_BYTES and part.box.shape:
        return sum(
            _read_part(data, piece, dtype, strides, target)
            for piece in _windows(part, dtype.itemsize)
        )
    staged = torch.empty((part.stop - part.start) // dtype.itemsize, dtype=dtype)
    done = data.read(part.start, part.stop, _memory(staged))
    shape = part.box.shape
    into.copy_(staged.view(shape) if part.contiguous else staged.as_strided(shape, strides))
    return done


def _windows(part: Part, itemsize: int) -> Iterator[Part]:
    """A long contiguous part in pieces that fit beside the target: rows of its first long dim."""
    box = part.box
    dim = next(d for d, size in enumerate(box.shape) if size > 1)
    row = box.num_elements // box.shape[dim] * itemsize
    rows = max(1, WINDOW_BYTES // row)
    for first in range(0, box.shape[dim], rows):
        last = min(first + rows, box.shape[dim])
        start, stop = list(box.start), list(box.stop)
        start[dim], stop[dim] = box.start[dim] + first, box.start[dim] + last
        piece = Region(tuple(start), tuple(stop))
        yield Part(part.start + first * row, part.start + last * row, piece, True)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to write into."""
    # Not `view(-1)`: a single element counts as contiguous whatever its stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _fetch(source: Source, file: str, offset: int, nbytes: int) -> bytes:
    return source.store.read(source.key(file), offset, offset + nbytes)
