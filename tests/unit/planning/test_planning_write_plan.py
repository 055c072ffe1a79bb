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
    GlobalPlan,
    LocalPlan,
    LocalPlans,
    LocalTensor,
    known_plans,
    merge_local_plans,
    neighbor_plans_of,
    plan,
)
from holdfast.state.shard import Mesh, MeshPlacement, ShardSpec, pieces_of

ITEM = 4  # float32


def offer_of(tensors: Mapping[str, tuple[tuple[int, ...], MeshPlacement | None]]) -> LocalPlan:
    return LocalPlan(
        {
            name: LocalTensor("float32", shape, (name,), placement)
            for name, (shape, placement) in tensors.items()
        }
    )


def planned(local_plans: Sequence[LocalPlans]) -> GlobalPlan:
    return plan(merge_local_plans(local_plans))


def written(whole: GlobalPlan, rank: int) -> list[tuple[str, Region]]:
    return [(placed.name, r) for placed in whole.tensors for r in placed.regions_of(rank)]


def nbytes_of(whole: GlobalPlan, rank: int) -> int:
    return sum(region.num_elements * ITEM for _, region in written(whole, rank))


@st.composite
def spreads(draw: st.DrawFn, mesh: Mesh, num_dims: int) -> MeshPlacement:
    """Any way to lie over a mesh: repeated, cut, cut in strides, on any axes and dims."""
    cuts = []
    for _ in mesh.shape:
        dim, num_strides = draw(st.integers(0, num_dims - 1)), draw(st.integers(1, 3))
        cuts.append(draw(st.sampled_from([None, ShardSpec(dim), ShardSpec(dim, num_strides)])))
    return MeshPlacement(mesh, tuple(cuts))


@st.composite
def jobs(draw: st.DrawFn) -> list[dict[str, LocalPlan]]:
    """Stages of a pipeline, each with a mesh of its own: tensors that lie over it in any way, some
    that every rank has, some of one rank, in two sections, values among them."""
    mesh_shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    num_stages, size = draw(st.integers(1, 2)), prod(mesh_shape)
    local_plans: list[dict[str, LocalPlan]] = [
        {section: LocalPlan() for section in ("layers", "optimizer")}
        for _ in range(size * num_stages)
    ]
    for stage in range(num_stages):
        ranks = tuple(range(stage * size, (stage + 1) * size))
        mesh = Mesh(mesh_shape, ranks)
        for number in range(draw(st.integers(0, 5))):
            shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
            section = draw(st.sampled_from(["layers", "optimizer"]))
            shared = draw(st.booleans())
            name = f"{section}.{number}" if shared else f"{section}.{stage}.{number}"
            placement = None if shared else draw(spreads(mesh, len(shape)))
            tensor = LocalTensor("float32", (7, 2) if shared else shape, (section, name), placement)
            for rank in ranks:
                local_plans[rank][section].tensors[name] = tensor
    for rank, sections in enumerate(local_plans):
        sections["optimizer"].values["lr"] = ("optimizer", "lr")
        sections["rng"] = LocalPlan(values={f"rank_{rank}": ("rng", f"rank_{rank}")})
    # What ranks offer alike is one object, as after it was gathered.
    distinct = [local_plan for sections in local_plans for local_plan in sections.values()]
    return [
        {
            section: next(o for o in distinct if o == local_plan)
            for section, local_plan in sections.items()
        }
        for sections in local_plans
    ]


@given(jobs())
def test_every_element_is_written_once_by_a_rank_that_holds_it(
    job: list[dict[str, LocalPlan]],
) -> None:
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
        for local_plan in sections.values():
            for name, tensor in local_plan.tensors.items():
                assert first_overlap(regions[name]) is None
                assert sum(r.num_elements for r in regions[name]) == prod(tensor.shape)


def held_by(tensor: LocalTensor, rank: int) -> list[Region]:
    if tensor.placement is None:
        return [Region.whole(tensor.shape)]
    mesh = tensor.placement.mesh
    coordinate = [*product(*map(range, mesh.shape))][mesh.ranks.index(rank)]
    return [p.region for p in pieces_of(tensor.shape, tensor.placement.splits_at(coordinate))]


@given(jobs())
def test_a_rank_finds_its_own_part_from_what_little_it_is_told(
    job: list[dict[str, LocalPlan]],
) -> None:
    """G9. Method: the plan of the whole census against each rank's own, from its view: the same
    regions in the same order, the same values."""
    all_plans = merge_local_plans(job)
    whole, size = plan(all_plans), len(job)
    for rank, view in enumerate(neighbor_plans_of(all_plans, size)):
        own = plan(known_plans(view, job[rank], size))
        assert written(own, rank) == written(whole, rank)
        mine, all_ = ([n for n, (r, _) in p.values.items() if r == rank] for p in (own, whole))
        assert mine == all_


def test_what_all_offer_alike_is_told_to_none_and_what_one_has_alone_is_not_sent() -> None:
    """Method: 64 ranks of one mesh, each with a value of its own: no view holds an offer."""
    mesh = MeshPlacement(Mesh((64,), tuple(range(64))), (ShardSpec(0),))
    layers = offer_of({"w": ((128, 2), mesh)})
    job = [
        {"layers": layers, "rng": LocalPlan(values={str(r): ("rng", str(r))})} for r in range(64)
    ]
    for rank, view in enumerate(neighbor_plans_of(merge_local_plans(job), 64)):
        assert {section: [*map(tuple, known)] for section, known in view.items()} == {
            "rng": [(range(rank, rank + 1), None)]
        }


@pytest.mark.parametrize("num_tensors", [1, 3, 16, 1000])
def test_what_several_ranks_hold_is_shared_out_by_bytes(num_tensors: int) -> None:
    """Method: tensors of all sizes, on four ranks alike: no rank writes more than its quarter and a
    row, and hardly a tensor is cut."""
    generator = np.random.default_rng(num_tensors)
    heights = generator.integers(1, 20_000_000 // num_tensors, num_tensors).tolist()
    local_plan = offer_of({f"t{i}": ((height, 16), None) for i, height in enumerate(heights)})
    whole = planned([{"layers": local_plan}] * 4)
    loads = [nbytes_of(whole, rank) for rank in range(4)]
    total = sum(heights) * 16 * ITEM
    assert sum(loads) == total
    assert max(loads) <= total / 4 + 2 * 16 * ITEM
    assert sum(len(placed.rank) for placed in whole.tensors) <= num_tensors + 3


def test_a_little_that_all_hold_is_not_shared_out() -> None:
    """Method: less than a stretch, in many tensors."""
    local_plan = offer_of({f"t{i}": ((STRETCH_BYTES_MIN // ITEM // 11,), None) for i in range(10)})
    whole = planned([{"layers": local_plan}] * 8)
    assert [len(written(whole, rank)) for rank in range(8)] == [10, *[0] * 7]


def test_shards_that_replicas_hold_are_shared_out_between_these() -> None:
    """Method: two replicas of four shards; each rank writes half of its shard's bytes."""
    ranks = tuple(range(8))
    hybrid = MeshPlacement(Mesh((2, 4), ranks), (None, ShardSpec(0)))
    tensors: dict[str, tuple[tuple[int, ...], MeshPlacement | None]] = {
        f"t{i}": ((1 << 10, 1 << 10), hybrid) for i in range(9)
    }
    whole = planned([{"layers": offer_of(tensors)}] * 8)
    assert [nbytes_of(whole, r) for r in ranks] == [9 << 19] * 8


def test_a_value_is_written_by_the_first_rank_that_has_it() -> None:
    """Method: one that all have, one that rank 1 has alone."""
    both = LocalPlan(values={"a": ("a",)})
    whole = planned([{"x": both}, {"x": both, "y": LocalPlan(values={"b": ("b",)})}])
    assert whole.values == {"a": (0, ("a",)), "b": (1, ("b",))}


def refused(*local_plans: LocalPlan) -> str:
    with pytest.raises(MismatchError) as error:
        planned([{"x": local_plan} for local_plan in local_plans])
    return error.value.what


def test_every_disagreement_of_the_ranks_is_told_at_once() -> None:
    """G6. Method: a shape, a dtype, a hole, an overlap and a kind, all wrong in one plan."""
    rows = MeshPlacement(Mesh((3,), (0, 1, 2)), (ShardSpec(0),))
    first = offer_of(
        {"shape": ((4, 1), None), "dtype": ((4, 1), None), "hole": ((6, 1), rows)}
        | {"twice": ((4, 1), None), "kind": ((4, 1), None)}
    )
    second = offer_of({"shape": ((5, 1), None), "hole": ((6, 1), rows)} | {"twice": ((4, 1), rows)})
    second.tensors["dtype"] = LocalTensor("float64", (4, 1), ("dtype",))
    second.values["kind"] = ("kind",)
    said = refused(first, second, LocalPlan(values={"kind": ("kind",)}))
    for name in ("shape", "dtype", "hole", "twice", "kind"):
        assert f"`{name}`" in said
    assert "float64 [4, 1] on rank 1" in said
    assert "the ranks hold 4 of 4" not in said


def test_a_shard_that_its_rank_does_not_offer_is_missed() -> None:
    """G6. Method: three ranks in the mesh, two of them with the tensor."""
    rows = MeshPlacement(Mesh((3,), (0, 1, 2)), (ShardSpec(0),))
    assert "hold 4 of 6 elements" in refused(*[offer_of({"w": ((6,), rows)})] * 2, LocalPlan())


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
    value = LocalPlan(values={"a": ("a",)})
    said = refused(*([value, tensor] if value_first else [tensor, value]))
    assert "`a` is a tensor on one rank, a value on" in said


def tied(second: bool, placement: MeshPlacement) -> LocalPlan:
    """`a`, and `b` either tied to it or a tensor of its own."""
    local_plan = offer_of(
        {"a": ((1, 4), placement), **({} if second else {"b": ((1, 4), placement)})}
    )
    if second:
        local_plan.aliases["b"] = ("a", ("b",))
    return local_plan


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_rank_with_no_elements_cannot_see_that_tensors_are_tied(empty_first: bool) -> None:
    """G6. Method: tied weights sharded over more ranks than they have rows: the ranks without a row
    have no memory to tell by. What the others see holds; `b` is written under no rank's name."""
    ranks = (1, 0) if empty_first else (0, 1)
    placement = MeshPlacement(Mesh((2,), ranks), (ShardSpec(0),))
    local_plans = [tied(True, placement), tied(False, placement)]
    whole = planned(
        [{"x": local_plan} for local_plan in (local_plans[::-1] if empty_first else local_plans)]
    )
    assert [placed.name for placed in whole.tensors] == ["a"]
    assert whole.aliases == {"b": ("a", ("b",))}


def test_ranks_that_do_not_agree_on_what_is_tied_are_told_so() -> None:
    """G6. Method: tied on one rank, two tensors on another; taking either for true would lose the
    other's elements."""
    columns = MeshPlacement(Mesh((2,), (0, 1)), (ShardSpec(1),))
    said = refused(tied(True, columns), tied(False, columns))
    assert "`b` is tied to `a` on rank 0, a tensor of its own on rank 1" in said
