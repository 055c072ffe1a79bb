"""Data that several ranks want reaches each of them as if it had read it itself."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.catalog.catalog import open_manifest
from holdfast.catalog.source import Source
from holdfast.comm import Ranks
from holdfast.format.dtypes import BY_NAME
from holdfast.format.region import Region
from holdfast.loading import replicas
from holdfast.loading.read import Wanted
from holdfast.state.shard import Piece
from holdfast.storage.memory import MemoryStore
from holdfast.testing.ranks import run_ranks
from plans import bits, random_tensor, save_regions

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def a_box(chance: random.Random, shape: tuple[int, ...]) -> Region:
    bounds = [sorted((chance.randint(0, n), chance.randint(0, n))) for n in shape]
    return Region(tuple(b[0] for b in bounds), tuple(b[1] for b in bounds))


def a_target(chance: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor with its dims in any order in memory."""
    order = chance.sample(range(len(shape)), len(shape))
    sizes = [shape[dim] for dim in order]
    # Not `zeros` of the dtype: torch cannot fill all of them on the CPU.
    nbytes = math.prod(sizes) * dtype.itemsize
    made = torch.zeros(nbytes, dtype=torch.uint8).view(dtype).view(sizes)
    return made.permute([order.index(dim) for dim in range(len(shape))])


@given(st.randoms(use_true_random=False), st.sampled_from([16, 48, 256, 4 << 20]))
def test_every_rank_gets_the_bits_that_it_would_read(chance: random.Random, nbytes: int) -> None:
    """G6. Method: up to three ranks save random bits of every dtype. Up to four ranks want boxes,
    each shared with any of the others, in any order, into targets with any strides, in messages of
    any size. The elements are compared with slicing."""
    store = MemoryStore()
    wholes, boxes = {}, {}
    for number in range(chance.randint(1, 4)):
        shape = tuple(chance.randint(0, 7) for _ in range(chance.randint(0, 3)))
        whole = random_tensor(chance.choice(sorted(BY_NAME)), shape, number)
        wholes[f"t{number}"] = whole
        boxes[f"t{number}"] = [Region.whole(shape), a_box(chance, shape)]
    # A tensor cut into rows, so that a box comes from several chunks.
    held = {
        name: (whole, [[region] for region in rows_of(chance, tuple(whole.shape))])
        for name, whole in wholes.items()
    }
    save_regions(store, "step-1", held, max(len(regions) for _, regions in held.values()))
    source = Source(store, "step-1", open_manifest(store, "step-1"))
    size = chance.randint(1, 4)
    asked = [
        [
            Wanted(name, [Piece(box, Region.whole(box.shape))], target)
            for name, whole in wholes.items()
            for box in [chance.choice(boxes[name])]
            for target in [a_target(chance, box.shape, whole.dtype)]
            if chance.random() < 0.9
        ]
        for _ in range(size)
    ]

    for wanted in asked:
        chance.shuffle(wanted)

    def work(ranks: Ranks) -> int:
        num_read, _ = replicas.read_shared(source, asked[ranks.rank], {}, ranks, num_local=2)
        return num_read

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(replicas, "BUNDLE_BYTES", nbytes)
        run_ranks(size, work)
    for want in (want for wanted in asked for want in wanted):
        whole, box = wholes[want.name], want.pieces[0].region
        assert bits(want.local) == bits(whole[box.slices()] if whole.ndim else whole)


def rows_of(chance: random.Random, shape: tuple[int, ...]) -> list[Region]:
    if not shape or shape[0] < 2:
        return [Region.whole(shape)]
    cut, zeros = chance.randint(1, shape[0] - 1), (0,) * (len(shape) - 1)
    return [Region((0, *zeros), (cut, *shape[1:])), Region((cut, *zeros), shape)]
