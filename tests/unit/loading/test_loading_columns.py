"""Loads in which ranks want different columns of the same rows: each row is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import holdfast
from holdfast.catalog.open_any import open_any
from holdfast.catalog.source import Source
from holdfast.comm import Ranks
from holdfast.format.region import Region
from holdfast.loading.read import Wanted
from holdfast.loading.replicas import read_shared
from holdfast.planning.read_plan import COLUMN_BYTES_MAX, rows_around
from holdfast.state.shard import Piece
from holdfast.storage.local import LocalStore
from holdfast.testing.ranks import try_ranks

SIZE = 4

Wants = Mapping[str, Sequence[Region]]
"""Boxes of each tensor that a rank wants."""


def columns(shape: tuple[int, ...], rank: int, size: int = SIZE) -> Region:
    """An even share of the last dim."""
    width = shape[-1]
    start, stop = width * rank // size, width * (rank + 1) // size
    return Region((*[0] * (len(shape) - 1), start), (*shape[:-1], stop))


def load(
    source: Source, state: Mapping[str, torch.Tensor], wants: Sequence[Wants]
) -> list[int | BaseException]:
    """Read what each rank wants and check it. Returns the bytes that each rank read, or its
    error."""

    def work(ranks: Ranks) -> int:
        wanted, expected = [], []
        for name, regions in wants[ranks.rank].items():
            for region in regions:
                local = torch.zeros(region.shape, dtype=state[name].dtype)
                piece = Piece(region, Region.whole(region.shape))
                wanted.append(Wanted(name, [piece], local))
                expected.append(state[name][region.slices()])
        num_read, _ = read_shared(source, wanted, {}, ranks, ranks.size)
        for want, numbers in zip(wanted, expected, strict=True):
            assert torch.equal(want.local, numbers), want.name
        return num_read

    return try_ranks(len(wants), work)


def saved(folder: Path, state: Mapping[str, torch.Tensor]) -> Source:
    holdfast.save(folder / "step-1", dict(state))
    return source_of(folder / "step-1")


def source_of(path: Path) -> Source:
    return open_any(LocalStore(path.parent), path.name).source


def total(ends: Sequence[int | BaseException]) -> int:
    numbers = []
    for end in ends:
        assert isinstance(end, int), end
        numbers.append(end)
    return sum(numbers)


def test_columns_of_the_same_rows_are_read_once(tmp_path: Path) -> None:
    """G6. Method: four ranks want a quarter of the columns each: of a matrix of several messages,
    of one whose rows are shorter than a block, of experts, and of a small one. A replica and rows
    are wanted beside them. All ranks together read each byte once."""
    state = {
        "large": torch.randn(3001, 1203),
        "experts": torch.randn(6, 301, 1003).bfloat16(),
        "small": torch.randn(33, 9),
        "replica": torch.randn(1000, 1000),
        "rows": torch.randn(1024, 1024),
    }
    wants: list[Wants] = []
    for rank in range(SIZE):
        want = {
            name: [columns(tuple(state[name].shape), rank)]
            for name in ("large", "experts", "small")
        }
        want["replica"] = [Region.whole((1000, 1000))]
        want["rows"] = [Region((256 * rank, 0), (256 * (rank + 1), 1024))]
        wants.append(want)
    ends = load(saved(tmp_path, state), state, wants)
    assert total(ends) == sum(tensor.nbytes for tensor in state.values())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["hf", "dcp"])
def test_columns_of_other_formats_are_read_once_where_their_place_is_known(
    tmp_path: Path, kind: str
) -> None:
    """Method: safetensors tell the offset of each tensor. The containers of stock DCP do not, so
    each rank reads the large one for itself, and the small one is read once."""
    state = {"large": torch.randn(1500, 1203), "small": torch.randn(33, 9)}
    if kind == "dcp":
        dcp_save(dict(state), checkpoint_id=tmp_path / "stock", no_dist=True)
        source = source_of(tmp_path / "stock")
    else:
        from safetensors.torch import save_file

        (tmp_path / "hf").mkdir()
        save_file(state, tmp_path / "hf" / "model.safetensors")
        (tmp_path / "hf" / "config.json").write_text("{}")
        source = source_of(tmp_path / "hf")
    wants = [
        {name: [columns(tuple(tensor.shape), rank)] for name, tensor in state.items()}
        for rank in range(SIZE)
    ]
    num_read = total(load(source, state, wants))
    nbytes = sum(tensor.nbytes for tensor in state.values())
    if kind == "hf":
        assert num_read == nbytes
    else:
        assert nbytes < num_read < SIZE * nbytes


def test_damage_in_shared_rows_ends_the_load_on_all(tmp_path: Path) -> None:
    """G3, G8. Method: a flipped bit in rows that one rank reads for the others."""
    state = {"large": torch.randn(3001, 1203)}
    source = saved(tmp_path, state)
    (data,) = (tmp_path / "step-1").glob("*.distcp")
    damaged = bytearray(data.read_bytes())
    damaged[(source.manifest.tensors["large"].chunks[0].data_offset or 0) + (9 << 20)] ^= 1
    data.write_bytes(damaged)
    wants = [{"large": [columns((3001, 1203), rank)]} for rank in range(SIZE)]
    for end in load(source, state, wants):
        assert isinstance(end, holdfast.DamagedError)
        assert "block 36 of `large`" in str(end)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A box with elements."""
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(low + 1, n)) for low, n in zip(start, shape, strict=True))
    return Region(start, stop)


@st.composite
def wishes(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[dict[str, list[Region]]]]:
    """Shapes of tensors, and for each of two to four ranks up to three boxes of each, which other
    ranks often want too."""
    size = st.integers(1, 40)
    shapes = draw(st.lists(st.tuples(size, size, size), min_size=1, max_size=3))
    wants: list[dict[str, list[Region]]] = [{} for _ in range(draw(st.integers(2, 4)))]
    for number, shape in enumerate(shapes):
        common = draw(boxes(shape))
        for rank, want in enumerate(wants):
            choices = [st.just(common), boxes(shape)]
            if shape[-1] >= len(wants):
                choices.append(st.just(columns(shape, rank, len(wants))))
            want[f"t{number}"] = draw(st.lists(st.one_of(choices), max_size=3, unique=True))
    return shapes, wants


@given(data=st.data())
def test_every_rank_gets_its_boxes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """G9. Method: random tensors, of which each rank wants random boxes: alike, columns of the same
    rows, and others."""
    shapes, wants = data.draw(wishes())
    state = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    total(load(saved(tmp_path_factory.mktemp("random"), state), state, wants))


@pytest.mark.parametrize(
    ("shape", "box", "rows"),
    [
        ((10, 10), Region((2, 4), (8, 6)), Region((2, 0), (8, 10))),
        ((4, 10, 10), Region((2, 4, 0), (3, 8, 5)), Region((2, 4, 0), (3, 8, 10))),
        ((4, 10, 10), Region((1, 4, 0), (3, 8, 10)), Region((1, 0, 0), (3, 10, 10))),
        ((10, 10), Region((2, 0), (8, 10)), None),
        ((10, 10), Region((2, 4), (3, 6)), None),
        ((10, 10), Region((2, 4), (3, 5)), None),
        ((), Region((), ()), None),
    ],
)
def test_rows_around_columns(shape: tuple[int, ...], box: Region, rows: Region | None) -> None:
    assert rows_around(box, shape, 4) == rows


def test_long_runs_are_no_columns() -> None:
    """Method: halves of rows, with runs one byte shorter than the limit, and as long."""
    width = COLUMN_BYTES_MAX - 1
    box = Region((0, 0), (2, width))
    assert rows_around(box, (2, 2 * width), 1) == Region((0, 0), (2, 2 * width))
    width += 1
    assert rows_around(Region((0, 0), (2, width)), (2, 2 * width), 1) is None
