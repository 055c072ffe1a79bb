"""Who writes what: every element once, in balance, and every disagreement told."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.engine.plan import Offer, Share, TensorOffer, shares
from holdfast.errors import MismatchError
from holdfast.format.region import Region, first_overlap

ITEM = 4  # float32


def offer_of(tensors: Mapping[str, tuple[tuple[int, ...], tuple[Region, ...]]]) -> Offer:
    return Offer(
        {
            name: TensorOffer("float32", shape, regions, (name,))
            for name, (shape, regions) in tensors.items()
        }
    )


def rows(lo: int, hi: int, width: int) -> Region:
    return Region((lo, 0), (hi, width))


@st.composite
def jobs(draw: st.DrawFn) -> list[Offer]:
    """Ranks as a grid of replicas and shards; each tensor is cut by rows over the shards, or held
    by all."""
    num_replicas, num_shards = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = list(product(range(num_replicas), range(num_shards)))
    offers: list[dict[str, tuple[tuple[int, ...], tuple[Region, ...]]]] = [{} for _ in ranks]
    for number in range(draw(st.integers(0, 6))):
        height, width = draw(st.integers(0, 30)), draw(st.integers(1, 9))
        sharded = draw(st.booleans()) and height
        size = -(-height // num_shards) if sharded else height
        for offer, (_, shard) in zip(offers, ranks, strict=True):
            lo = min(size * shard, height) if sharded else 0
            hi = min(lo + size, height)
            regions = (rows(lo, hi, width),) if hi > lo or not height else ()
            offer[f"t{number}"] = (height, width), regions
    return [offer_of(offer) for offer in offers]


def nbytes_of(share: Share) -> int:
    return sum(region.num_elements * ITEM for _, region in share.regions)


@given(jobs())
def test_every_element_is_written_once_by_a_rank_that_holds_it(offers: list[Offer]) -> None:
    """G6. Method: the shares of all ranks put together; each region is one that its rank has."""
    given_out = shares(offers)
    assert len(given_out) == len(offers)
    regions: dict[str, list[Region]] = {}
    for share, offer in zip(given_out, offers, strict=True):
        for name, region in share.regions:
            assert region in offer.tensors[name].regions
            regions.setdefault(name, []).append(region)
    for name, tensor in offers[0].tensors.items():
        assert first_overlap(regions[name]) is None
        assert sum(r.num_elements for r in regions[name]) == tensor.shape[0] * tensor.shape[1]


@given(jobs())
def test_no_rank_writes_more_than_its_part_and_one_region(offers: list[Offer]) -> None:
    """Method: the bound of greedy scheduling: among ranks that hold the same, the heaviest is ahead
    of the lightest by one region at most."""
    given_out = shares(offers)
    load = [nbytes_of(share) for share in given_out]
    largest = max(
        (r.num_elements * ITEM for o in offers for t in o.tensors.values() for r in t.regions),
        default=0,
    )
    same = [r for r, o in enumerate(offers) if o == offers[0]]
    assert max(load[r] for r in same) - min(load[r] for r in same) <= largest


@given(jobs())
def test_the_same_offers_give_the_same_shares(offers: list[Offer]) -> None:
    """G9. Method: planned twice."""
    assert shares(offers) == shares(offers)


def test_what_all_ranks_hold_is_dealt_out_evenly() -> None:
    """Method: sixteen equal tensors, replicated on four ranks."""
    held = {f"t{i}": ((8, 2), (rows(0, 8, 2),)) for i in range(16)}
    assert [len(s.regions) for s in shares([offer_of(held)] * 4)] == [4, 4, 4, 4]


def test_ranks_that_hold_shards_get_less_of_what_all_hold() -> None:
    """Method: rank 0 alone holds a large tensor; the shared ones go to the others."""
    shared = {f"t{i}": ((1, 1), (rows(0, 1, 1),)) for i in range(6)}
    large = {"large": ((100, 1), (rows(0, 100, 1),))}
    counts = [len(s.regions) for s in shares([offer_of(shared | large), *[offer_of(shared)] * 2])]
    assert counts == [1, 3, 3]


def test_a_value_is_written_by_the_first_rank_that_has_it() -> None:
    """Method: one that all have, one that rank 1 has alone."""
    both: dict[str, tuple[str | int, ...]] = {"a": ("a",)}
    given_out = shares([Offer(values=both), Offer(values={**both, "b": ("b",)})])
    assert [share.values for share in given_out] == [("a",), ("b",)]


def refused(offers: list[Offer]) -> str:
    with pytest.raises(MismatchError) as error:
        shares(offers)
    return error.value.what


def test_every_disagreement_of_the_ranks_is_told_at_once() -> None:
    """G6. Method: a shape, a dtype, a hole, an overlap and a kind, all wrong in one plan."""
    whole = (rows(0, 4, 1),)
    first = offer_of(
        {
            "shape": ((4, 1), whole),
            "dtype": ((4, 1), whole),
            "hole": ((4, 1), (rows(0, 2, 1),)),
            "twice": ((4, 1), (rows(0, 3, 1),)),
            "kind": ((4, 1), whole),
        }
    )
    second = offer_of(
        {
            "shape": ((5, 1), (rows(0, 5, 1),)),
            "hole": ((4, 1), (rows(3, 4, 1),)),
            "twice": ((4, 1), (rows(2, 4, 1),)),
        }
    )
    second.tensors["dtype"] = TensorOffer("float64", (4, 1), whole, ("dtype",))
    second.values["kind"] = ("kind",)
    said = refused([first, second])
    for name in ("shape", "dtype", "hole", "twice", "kind"):
        assert f"`{name}`" in said
    assert "float64 [4, 1] on rank 1" in said
    assert "3 of 4 elements" in said


def test_the_same_number_of_elements_does_not_hide_an_overlap() -> None:
    """G6. Method: a hole as large as the overlap beside it."""
    offers = [
        offer_of({"w": ((4, 1), (rows(0, 2, 1),))}),
        offer_of({"w": ((4, 1), (rows(1, 3, 1),))}),
    ]
    assert "some twice" in refused(offers)


@pytest.mark.parametrize("value_first", [True, False])
@pytest.mark.parametrize("alias", [True, False])
def test_one_name_is_not_a_tensor_here_and_a_value_there(value_first: bool, alias: bool) -> None:
    """G6. Method: whichever rank has which, and whether the tensor is tied to another; a checkpoint
    with both would have two entries of one name."""
    tensor = offer_of({"first": ((4, 1), (rows(0, 4, 1),))})
    if alias:
        tensor.aliases["a"] = ("first", ("a",))
    else:
        tensor.tensors["a"] = tensor.tensors["first"]
    value = Offer(values={"a": ("a",)})
    said = refused([value, tensor] if value_first else [tensor, value])
    assert "`a` is a tensor on one rank, a value on" in said


def tied(second: bool, regions: tuple[Region, ...]) -> Offer:
    """`a`, and `b` either tied to it or a tensor of its own."""
    offer = offer_of({"a": ((4, 1), regions), **({} if second else {"b": ((4, 1), regions)})})
    if second:
        offer.aliases["b"] = ("a", ("b",))
    return offer


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_rank_with_no_elements_cannot_see_that_tensors_are_tied(empty_first: bool) -> None:
    """G6. Method: tied weights sharded over more ranks than they have rows: the ranks without a row
    have no memory to tell by. What the others see holds; `b` is written under no rank's name."""
    offers = [tied(True, (rows(0, 4, 1),)), tied(False, ())]
    given_out = shares(offers[::-1] if empty_first else offers)
    assert sorted(region for share in given_out for region in share.regions) == [
        ("a", rows(0, 4, 1))
    ]


def test_ranks_that_do_not_agree_on_what_is_tied_are_told_so() -> None:
    """G6. Method: tied on one rank, two tensors on another; taking either for true would lose the
    other's elements."""
    said = refused([tied(True, (rows(0, 2, 1),)), tied(False, (rows(2, 4, 1),))])
    assert "`b` is tied to `a` on rank 0, a tensor of its own on rank 1" in said
