"""Who writes what: every element once, in balance, and every disagreement told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import MismatchError
from holdfast.format.region import Region, first_overlap
from holdfast.planning.write_plan import (
    STRETCH_BYTES_MIN,
    Offer,
    Offers,
    Plan,
    TensorOffer,
    census_from,
    census_of,
    plan,
    views_of,
)
from holdfast.state.shard import Cut, Mesh, Spread, pieces_of

ITEM = 4  # float32


def offer_of(tensors: Mapping[str, tuple[tuple[int, ...], Spread | None]]) -> Offer:
    return Offer(
        {
            name: TensorOffer("float32", shape, (name,), spread)
            for name, (shape, spread) in tensors.items()
        }
    )


def planned(offers: Sequence[Offers]) -> Plan:
    return plan(census_of(offers))


def written(whole: Plan, rank: int) -> list[tuple[str, Region]]:
    return [(placed.name, r) for placed in whole.tensors for r in placed.regions_of(rank)]


def nbytes_of(whole: Plan, rank: int) -> int:
    return sum(region.num_elements * ITEM for _, region in written(whole, rank))


@st.composite
def spreads(draw: st.DrawFn, mesh: Mesh, num_dims: int) -> Spread:
    """Any way to lie over a mesh: repeated, cut, cut in strides, on any axes and dims."""
    cuts = []
    for _ in mesh.shape:
        dim, num_strides = draw(st.integers(0, num_dims - 1)), draw(st.integers(1, 3))
        cuts.append(draw(st.sampled_from([None, Cut(dim), Cut(dim, num_strides)])))
    return Spread(mesh, tuple(cuts))


@st.composite
def jobs(draw: st.DrawFn) -> list[dict[str, Offer]]:
    """Stages of a pipeline, each with a mesh of its own: tensors that lie over it in any way, some
    that every rank has, some of one rank, in two sections, values among them."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    num_stages, size = draw(st.integers(1, 2)), prod(mesh_shape)
    offers: list[dict[str, Offer]] = [
        {section: Offer() for section in ("layers", "optimizer")} for _ in range(size * num_stages)
    ]
    for stage in range(num_stages):
        ranks = tuple(range(stage * size, (stage + 1) * size))
        mesh = Mesh(mesh_shape, ranks)
        for number in range(draw(st.integers(0, 5))):
            shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
            section = draw(st.sampled_from(["layers", "optimizer"]))
            shared = draw(st.booleans())
            name = f"{section}.{number}" if shared else f"{section}.{stage}.{number}"
            spread = None if shared else draw(spreads(mesh, len(shape)))
            tensor = TensorOffer("float32", (7, 2) if shared else shape, (section, name), spread)
            for rank in ranks:
                offers[rank][section].tensors[name] = tensor
    for rank, sections in enumerate(offers):
        sections["optimizer"].values["lr"] = ("optimizer", "lr")
        sections["rng"] = Offer(values={f"rank_{rank}": ("rng", f"rank_{rank}")})
    # What ranks offer alike is one object, as after it was gathered.
    distinct = [offer for sections in offers for offer in sections.values()]
    return [
        {section: next(o for o in distinct if o == offer) for section, offer in sections.items()}
        for sections in offers
    ]


@given(jobs())
def test_every_element_is_written_once_by_a_rank_that_holds_it(job: list[dict[str, Offer]]) -> None:
    """G6. Method: all regions that are written, against what each rank holds by its place in the
    mesh; none overlap, and together they are each tensor."""
    whole = planned(job)
    regions: dict[str, list[Region]] = {}
    for rank in range(len(job)):
        for name, region in written(whole, rank):
            tensor = next(o.tensors[name] for o in job[rank].values() if name in o.tensors)
            assert any((region & held) == region for held in held_by(tensor, rank))
            regions.setdefault(name, []).append(region)
    for sections in job:
        for offer in sections.values():
            for name, tensor in offer.tensors.items():
                assert first_overlap(regions[name]) is None
                assert sum(r.num_elements for r in regions[name]) == prod(tensor.shape)


def held_by(tensor: TensorOffer, rank: int) -> list[Region]:
    if tensor.spread is None:
        return [Region.whole(tensor.shape)]
    mesh = tensor.spread.mesh
    coordinate = [*product(*map(range, mesh.shape))][mesh.ranks.index(rank)]
    return [p.region for p in pieces_of(tensor.shape, tensor.spread.splits_at(coordinate))]


@given(jobs())
def test_a_rank_finds_its_own_part_from_what_little_it_is_told(
    job: list[dict[str, Offer]],
) -> None:
    """G9. Method: the plan of the whole census against each rank's own, from its view: the same
    regions in the same order, the same values."""
    census = census_of(job)
    whole, size = plan(census), len(job)
    for rank, view in enumerate(views_of(census, size)):
        own = plan(census_from(view, job[rank], size))
        assert written(own, rank) == written(whole, rank)
        mine, all_ = ([n for n, (r, _) in p.values.items() if r == rank] for p in (own, whole))
        assert mine == all_


def test_what_all_offer_alike_is_told_to_none_and_what_one_has_alone_is_not_sent() -> None:
    """Method: 64 ranks of one mesh, each with a value of its own: no view holds an offer."""
    mesh = Spread(Mesh((64,), tuple(range(64))), (Cut(0),))
    layers = offer_of({"w": ((128, 2), mesh)})
    job = [{"layers": layers, "rng": Offer(values={str(r): ("rng", str(r))})} for r in range(64)]
    for rank, view in enumerate(views_of(census_of(job), 64)):
        assert {section: [*map(tuple, known)] for section, known in view.items()} == {
            "rng": [(range(rank, rank + 1), None)]
        }


@pytest.mark.parametrize("num_tensors", [1, 3, 16, 1000])
def test_what_several_ranks_hold_is_shared_out_by_bytes(num_tensors: int) -> None:
    """Method: tensors of all sizes, on four ranks alike: no rank writes more than its quarter and a
    row, and hardly a tensor is cut."""
    generator = np.random.default_rng(num_tensors)
    heights = generator.integers(1, 20_000_000 // num_tensors, num_tensors).tolist()
    offer = offer_of({f"t{i}": ((height, 16), None) for i, height in enumerate(heights)})
    whole = planned([{"layers": offer}] * 4)
    loads = [nbytes_of(whole, rank) for rank in range(4)]
    total = sum(heights) * 16 * ITEM
    assert sum(loads) == total
    assert max(loads) <= total / 4 + 2 * 16 * ITEM
    assert sum(len(placed.rank) for placed in whole.tensors) <= num_tensors + 3


def test_a_little_that_all_hold_is_not_shared_out() -> None:
    """Method: less than a stretch, in many tensors."""
    offer = offer_of({f"t{i}": ((STRETCH_BYTES_MIN // ITEM // 11,), None) for i in range(10)})
    whole = planned([{"layers": offer}] * 8)
    assert [len(written(whole, rank)) for rank in range(8)] == [10, *[0] * 7]


def test_shards_that_replicas_hold_are_shared_out_between_these() -> None:
    """Method: two replicas of four shards; each rank writes half of its shard's bytes."""
    ranks = tuple(range(8))
    hybrid = Spread(Mesh((2, 4), ranks), (None, Cut(0)))
    tensors: dict[str, tuple[tuple[int, ...], Spread | None]] = {
        f"t{i}": ((1 << 10, 1 << 10), hybrid) for i in range(9)
    }
    whole = planned([{"layers": offer_of(tensors)}] * 8)
    assert [nbytes_of(whole, r) for r in ranks] == [9 << 19] * 8


def test_a_value_is_written_by_the_first_rank_that_has_it() -> None:
    """Method: one that all have, one that rank 1 has alone."""
    both = Offer(values={"a": ("a",)})
    whole = planned([{"x": both}, {"x": both, "y": Offer(values={"b": ("b",)})}])
    assert whole.values == {"a": (0, ("a",)), "b": (1, ("b",))}


def refused(*offers: Offer) -> str:
    with pytest.raises(MismatchError) as error:
        planned([{"x": offer} for offer in offers])
    return error.value.what


def test_every_disagreement_of_the_ranks_is_told_at_once() -> None:
    """G6. Method: a shape, a dtype, a hole, an overlap and a kind, all wrong in one plan."""
    rows = Spread(Mesh((3,), (0, 1, 2)), (Cut(0),))
    first = offer_of(
        {"shape": ((4, 1), None), "dtype": ((4, 1), None), "hole": ((6, 1), rows)}
        | {"twice": ((4, 1), None), "kind": ((4, 1), None)}
    )
    second = offer_of({"shape": ((5, 1), None), "hole": ((6, 1), rows)} | {"twice": ((4, 1), rows)})
    second.tensors["dtype"] = TensorOffer("float64", (4, 1), ("dtype",))
    second.values["kind"] = ("kind",)
    said = refused(first, second, Offer(values={"kind": ("kind",)}))
    for name in ("shape", "dtype", "hole", "twice", "kind"):
        assert f"`{name}`" in said
    assert "float64 [4, 1] on rank 1" in said
    assert "the ranks hold 4 of 4" not in said


def test_a_shard_that_its_rank_does_not_offer_is_missed() -> None:
    """G6. Method: three ranks in the mesh, two of them with the tensor."""
    rows = Spread(Mesh((3,), (0, 1, 2)), (Cut(0),))
    assert "hold 4 of 6 elements" in refused(*[offer_of({"w": ((6,), rows)})] * 2, Offer())


@pytest.mark.parametrize("value_first", [True, False])
@pytest.mark.parametrize("alias", [True, False])
def test_one_name_is_not_a_tensor_here_and_a_value_there(value_first: bool, alias: bool) -> None:
    """G6. Method: whichever rank has which, and whether the tensor is tied to another; a checkpoint
    with both would have two entries of one name."""
    tensor = offer_of({"first": ((4, 1), None)})
    if alias:
        tensor.aliases["a"] = ("first", ("a",))
    else:
        tensor.tensors["a"] = tensor.tensors["first"]
    value = Offer(values={"a": ("a",)})
    said = refused(*([value, tensor] if value_first else [tensor, value]))
    assert "`a` is a tensor on one rank, a value on" in said


def tied(second: bool, spread: Spread) -> Offer:
    """`a`, and `b` either tied to it or a tensor of its own."""
    offer = offer_of({"a": ((1, 4), spread), **({} if second else {"b": ((1, 4), spread)})})
    if second:
        offer.aliases["b"] = ("a", ("b",))
    return offer


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_rank_with_no_elements_cannot_see_that_tensors_are_tied(empty_first: bool) -> None:
    """G6. Method: tied weights sharded over more ranks than they have rows: the ranks without a row
    have no memory to tell by. What the others see holds; `b` is written under no rank's name."""
    ranks = (1, 0) if empty_first else (0, 1)
    spread = Spread(Mesh((2,), ranks), (Cut(0),))
    offers = [tied(True, spread), tied(False, spread)]
    whole = planned([{"x": offer} for offer in (offers[::-1] if empty_first else offers)])
    assert [placed.name for placed in whole.tensors] == ["a"]
    assert whole.aliases == {"b": ("a", ("b",))}


def test_ranks_that_do_not_agree_on_what_is_tied_are_told_so() -> None:
    """G6. Method: tied on one rank, two tensors on another; taking either for true would lose the
    other's elements."""
    columns = Spread(Mesh((2,), (0, 1)), (Cut(1),))
    said = refused(tied(True, columns), tied(False, columns))
    assert "`b` is tied to `a` on rank 0, a tensor of its own on rank 1" in said
